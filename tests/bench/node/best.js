'use strict'
// Fastify and ioredis at their best: a save is one script with one deadline for all keys, values
// stay the text that they came in, a summary is one MGET.

const { randomUUID } = require('node:crypto')
const fastify = require('fastify')({ logger: false })
const Redis = require('ioredis')

const TOTAL = 23
const TTL_MS = 7 * 24 * 3600 * 1000
// Deadlines are rounded up to this, so that 24 keys are touched once an hour and not by every save.
const COARSE_MS = TTL_MS / 168
const BASE = '/api/v1/onboarding'
const JSON_TYPE = 'application/json; charset=utf-8'

const redis = new Redis(process.env.REDIS_URL, { enableAutoPipelining: true })

// KEYS: state, progress, metadata, the step that is saved.
// ARGV: number of the step, its record, deadline in ms, time as text, what the keys of steps begin
// with: they are touched where the deadline moves, and counted anew where a step is.
// Returns the progress as JSON, or nil when there is no session.
redis.defineCommand('saveStep', {
  numberOfKeys: 4,
  lua: `
    local state = redis.call('HMGET', KEYS[1], 'saved', 'deadline', 'head')
    local saved = state[1]
    if not saved then return nil end
    local number, deadline, head = tonumber(ARGV[1]), ARGV[3], state[3]
    redis.call('SET', KEYS[4], ARGV[2], 'PXAT', deadline)
    if string.sub(saved, number, number) == '0' then
      saved = string.sub(saved, 1, number - 1) .. '1' .. string.sub(saved, number + 1)
      local steps = {}
      for at = 1, ${TOTAL} do
        if string.sub(saved, at, at) == '1' then steps[#steps + 1] = at end
      end
      head = '{"completed":' .. #steps .. ',"total":${TOTAL},"percentage":'
        .. string.format('%.2f', 100 * #steps / ${TOTAL})
        .. ',"completed_steps":[' .. table.concat(steps, ',') .. '],"started_at":"'
        .. redis.call('HGET', KEYS[1], 'started_at') .. '","last_updated":"'
      redis.call('HSET', KEYS[1], 'saved', saved, 'head', head)
    end
    if state[2] ~= deadline then
      redis.call('HSET', KEYS[1], 'deadline', deadline)
      redis.call('PEXPIREAT', KEYS[1], deadline)
      redis.call('PEXPIREAT', KEYS[3], deadline)
      for at = 1, ${TOTAL} do redis.call('PEXPIREAT', ARGV[5] .. at, deadline) end
    end
    local progress = head .. ARGV[4] .. '"}'
    redis.call('SET', KEYS[2], progress, 'PXAT', deadline)
    return progress
  `,
})

const numbers = Array.from({ length: TOTAL }, (_, at) => at + 1)
const deadline = () => Math.ceil((Date.now() + TTL_MS) / COARSE_MS) * COARSE_MS
const stepsOf = (prefix) => numbers.map((n) => `${prefix}step:${n}`)

function answer(reply, text, status = 200) {
  return reply.code(status).header('content-type', JSON_TYPE).send(text)
}

function refuse(reply, status, detail) {
  return answer(reply, `{"detail":"${detail}"}`, status)
}

// Bodies are looked at and kept as text.
fastify.addContentTypeParser('application/json', { parseAs: 'string' }, (_, body, done) => {
  done(null, body)
})

fastify.get('/livez', (_, reply) => answer(reply, '{"status":"ok"}'))

fastify.post(`${BASE}/session`, async (request, reply) => {
  const { workspace_id, user_id = null } = JSON.parse(request.body)
  if (typeof workspace_id !== 'string') return refuse(reply, 422, 'workspace_id is missing')
  const id = randomUUID()
  const at = new Date().toISOString()
  const prefix = `onboarding:${id}:`
  const until = deadline()
  const metadata = JSON.stringify({ workspace_id, user_id, started_at: at })
  const progress = `{"completed":0,"total":${TOTAL},"percentage":0.00,"completed_steps":[],"started_at":"${at}","last_updated":"${at}"}`
  await redis
    .multi()
    .hset(`${prefix}state`, 'saved', '0'.repeat(TOTAL), 'deadline', until, 'started_at', at)
    .pexpireat(`${prefix}state`, until)
    .set(`${prefix}metadata`, metadata, 'PXAT', until)
    .set(`${prefix}progress`, progress, 'PXAT', until)
    .exec()
  return answer(reply, `{"session_id":"${id}"}`, 201)
})

fastify.post(`${BASE}/:id/steps/:n`, async (request, reply) => {
  const { id, n } = request.params
  const body = request.body
  let data
  try {
    data = JSON.parse(body).data
  } catch {
    return refuse(reply, 400, 'Not JSON')
  }
  if (data === null || typeof data !== 'object') return refuse(reply, 422, 'data is missing')
  const number = Number(n)
  if (!(number >= 1 && number <= TOTAL)) return refuse(reply, 422, 'Unknown step')
  const at = new Date().toISOString()
  const prefix = `onboarding:${id}:`
  // The body is an object with the member "data": what precedes it joins it in the same object.
  const record = `{"session_id":"${id}","step_id":${n},"saved_at":"${at}",${body.trimStart().slice(1)}`
  const progress = await redis.saveStep(
    `${prefix}state`, `${prefix}progress`, `${prefix}metadata`, `${prefix}step:${n}`,
    n, record, deadline(), at, `${prefix}step:`,
  )
  if (progress === null) return refuse(reply, 404, 'Session not found')
  return answer(
    reply,
    `{"success":true,"session_id":"${id}","step_id":${n},"progress":${progress},"updated_at":"${at}"}`,
  )
})

fastify.get(`${BASE}/:id/steps/:n`, async (request, reply) => {
  const { id, n } = request.params
  const text = await redis.get(`onboarding:${id}:step:${n}`)
  return text === null ? refuse(reply, 404, 'Step not found') : answer(reply, text)
})

fastify.get(`${BASE}/:id/progress`, async (request, reply) => {
  const { id } = request.params
  const text = await redis.get(`onboarding:${id}:progress`)
  if (text === null) return refuse(reply, 404, 'Session not found')
  return answer(reply, `{"session_id":"${id}","progress":${text}}`)
})

fastify.get(`${BASE}/:id/summary`, async (request, reply) => {
  const { id } = request.params
  const prefix = `onboarding:${id}:`
  const [metadata, progress, ...steps] = await redis.mget(
    `${prefix}metadata`, `${prefix}progress`, ...stepsOf(prefix),
  )
  if (metadata === null || progress === null) return refuse(reply, 404, 'Session not found')
  // What is told of a step stands before its answers.
  const lines = steps.map((text, at) =>
    text === null
      ? `{"step_id":${at + 1},"saved_at":null}`
      : `${text.slice(0, text.indexOf(',"data":'))}}`,
  )
  return answer(
    reply,
    `{"session_id":"${id}","progress":${progress},"metadata":${metadata},"steps":[${lines.join(',')}]}`,
  )
})

fastify.listen({ host: '127.0.0.1', port: Number(process.env.PORT) })
