"""What the page on waiting says in words."""

from __future__ import annotations

MEANING = """\
**Wait time** is the fraction of the time in which workers have nothing to do, in %. It is a mean over workers and
seeds. Each policy runs at several settings. A case is one start, one distribution of compute times and one number
of workers. The curve of a policy is the least wait time that it reaches within each B. Between settings it is
straight on a scale of log B.

In the last table all curves are read at the same B: 25, 50 and 75 % of the B of `asynchronous`, which never waits.
The brackets hold the wait time at the settings on both sides. Nothing after the dots: no setting lies beyond. A
dash: no setting of the policy has such a B. Bold: the least, or less than a point more.

- B_sup is what `ps-elastic verify` estimates: max over t of sqrt(mean over seeds of (D_t/alpha)^2). Here t is the
  number of the gradient used. B_max is the largest D/alpha of any gradient of any seed. B_rms is the root mean
  square of all. With few seeds, B_sup is near B_max.
- The task is the quadratic with 4 parameters, alpha = 1/(6L). `training` begins at the default start. Its gradients
  have norm 11 and fall below the noise of norm 1, so copies drift straight away. `at rest` begins at the optimum:
  noise alone. This is hardest for a policy that adds norms, because n gradients of noise move the model by about
  sqrt(n) of them.
- D is to each policy's own x_t. For `norm_bounded` this is the server model including late gradients, so a late
  gradient counts from its own round. `norm_bounded, server model` is the same runs, measured like all others. There
  a gradient counts when it is added.
- `elastic_bound, exact step` knows the exact distance of every copy after each step that it might make. Only a
  simulation can know this ([_exact_step.py](../../launch/experiments/_exact_step.py)). It shows what is left to
  gain.
- `value_bounded` has a constant threshold here. With plain SGD it then decides like `elastic_bound` with
  `distance=path`. A test compares them gradient by gradient. So its column is also that of the cumulative step
  length.
""".splitlines()

WHY = """\
The reasons:

- `stale_synchronous` limits how many gradients a copy misses, not how far they lead. Its largest distance comes
  from the first, large gradients, when it waits too little. Later it waits as before, for changes that hardly
  matter.
- `norm_bounded`, by its own x_t, need not wait for a slow worker. A late gradient counts from its own round, and
  only the copies of others lack it. `elastic_bound` promises the distance to the model to which the gradient is
  added. So when this model has moved by B, it must wait for the slowest worker. These are two different promises.
  On the server's model, the same late gradients of `norm_bounded` are far outside. Its promise is about a mean, m
  M/p with the M of the run. The promise of `elastic_bound` is checked at every gradient.
- With noise alone, `elastic_bound` waits more than it must. It adds the norms of all gradients here to the distance
  of a copy. But n gradients of noise move the model by about sqrt(n) of them, and not away from the copy.
  `distance=refreshed` corrects this for the distance so far, not for the next step. The exact step shows what
  remains.
- By B_rms, a bound on every gradient has a price. What matters there is how many workers compute at the moment of a
  step. Rounds that wait for several gradients (`norm_bounded`) make fewer and larger steps.
- With equal compute times, `bound=0` waits least: all arrive together. Budgets between do wait there. A few
  gradients of a round are used at once, and the rest no longer fits.
""".splitlines()
