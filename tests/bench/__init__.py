"""Measure the service against what people would use instead, side by side.

`make bench` runs `__main__`, `plan` is what it measures. `contestants` starts each server as a
process of its own; `bare`, `described` and `node/` are those that are ours to write. `population`
fills them through their API, `wizard` knows what is sent to them and what they must answer, `load`
sends it and checks every answer, `machine` pins processes to cores and reads what they cost.
`rounds` takes the measurements in turns, `streams` the one of live streams. `budget` says what must
hold, `report` writes the tables and `picture` draws the ratios.

Only the HTTP interface and the environment of the service are known here.
"""
