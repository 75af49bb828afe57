"""From a push to the next model: messages in, replies out; no I/O, no clock, no MPI.

Imports compressors, policies, tasks, vectors, config.sections, records.tracker and of transport its messages; never
worker. Begin with `server`; `shard` asks the policy and carries its actions out, `replies` answers, `store` holds the
model, `discrepancy` measures, `run` counts; `single_block` makes the usual steps of a small model at once. `debts`,
`pipelining` and `layers` are for policies and options that need them.
"""
