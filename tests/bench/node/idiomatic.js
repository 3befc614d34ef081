'use strict'
// The service as one writes it with Fastify and ioredis: commands of one tick are pipelined by
// themselves, what depends on an answer waits for it, values are objects in JSON.

const { randomUUID } = require('node:crypto')
const fastify = require('fastify')({ logger: false })
const Redis = require('ioredis')

const TOTAL = 23
const TTL_S = 7 * 24 * 3600
const BASE = '/api/v1/onboarding'

const redis = new Redis(process.env.REDIS_URL, { enableAutoPipelining: true })
const keyOf = (id, name) => `onboarding:${id}:${name}`
const numbers = Array.from({ length: TOTAL }, (_, at) => at + 1)

function refuse(reply, status, detail) {
  return reply.code(status).send({ detail })
}

fastify.get('/livez', async () => ({ status: 'ok' }))

fastify.post(`${BASE}/session`, async (request, reply) => {
  const { workspace_id, user_id = null } = request.body ?? {}
  if (typeof workspace_id !== 'string') return refuse(reply, 422, 'workspace_id is missing')
  const session_id = randomUUID()
  const at = new Date().toISOString()
  const metadata = { workspace_id, user_id, started_at: at }
  const progress = {
    completed: 0, total: TOTAL, percentage: 0, completed_steps: [], started_at: at, last_updated: at,
  }
  await Promise.all([
    redis.set(keyOf(session_id, 'metadata'), JSON.stringify(metadata), 'EX', TTL_S),
    redis.set(keyOf(session_id, 'progress'), JSON.stringify(progress), 'EX', TTL_S),
  ])
  return reply.code(201).send({ session_id })
})

fastify.post(`${BASE}/:id/steps/:n`, async (request, reply) => {
  const { id } = request.params
  const step_id = Number(request.params.n)
  const data = request.body?.data
  if (!numbers.includes(step_id)) return refuse(reply, 422, 'Unknown step')
  if (data === null || typeof data !== 'object') return refuse(reply, 422, 'data is missing')

  const text = await redis.get(keyOf(id, 'progress'))
  if (text === null) return refuse(reply, 404, 'Session not found')
  const progress = JSON.parse(text)
  const at = new Date().toISOString()
  if (!progress.completed_steps.includes(step_id)) {
    progress.completed_steps.push(step_id)
    progress.completed_steps.sort((a, b) => a - b)
  }
  progress.completed = progress.completed_steps.length
  progress.percentage = Math.round((10000 * progress.completed) / TOTAL) / 100
  progress.last_updated = at

  const step = { step_id, data, saved_at: at }
  await redis.set(keyOf(id, `step:${step_id}`), JSON.stringify(step), 'EX', TTL_S)
  await redis.set(keyOf(id, 'progress'), JSON.stringify(progress), 'EX', TTL_S)
  // They share a lifetime.
  const others = numbers.filter((n) => n !== step_id).map((n) => keyOf(id, `step:${n}`))
  await Promise.all([keyOf(id, 'metadata'), ...others].map((key) => redis.expire(key, TTL_S)))
  return { success: true, session_id: id, step_id, progress, updated_at: at }
})

fastify.get(`${BASE}/:id/steps/:n`, async (request, reply) => {
  const { id, n } = request.params
  const text = await redis.get(keyOf(id, `step:${n}`))
  if (text === null) return refuse(reply, 404, 'Step not found')
  return { session_id: id, ...JSON.parse(text) }
})

fastify.get(`${BASE}/:id/progress`, async (request, reply) => {
  const { id } = request.params
  const text = await redis.get(keyOf(id, 'progress'))
  if (text === null) return refuse(reply, 404, 'Session not found')
  return { session_id: id, progress: JSON.parse(text) }
})

fastify.get(`${BASE}/:id/summary`, async (request, reply) => {
  const { id } = request.params
  const [metadata, progress, ...steps] = await Promise.all([
    redis.get(keyOf(id, 'metadata')),
    redis.get(keyOf(id, 'progress')),
    ...numbers.map((n) => redis.get(keyOf(id, `step:${n}`))),
  ])
  if (metadata === null || progress === null) return refuse(reply, 404, 'Session not found')
  return {
    session_id: id,
    progress: JSON.parse(progress),
    metadata: JSON.parse(metadata),
    steps: steps.map((text, at) => ({
      step_id: at + 1,
      saved_at: text === null ? null : JSON.parse(text).saved_at,
    })),
  }
})

fastify.listen({ host: '127.0.0.1', port: Number(process.env.PORT) })
