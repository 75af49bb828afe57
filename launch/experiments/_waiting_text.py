"""What the page on waiting says in words."""

from __future__ import annotations

MEANING = """\
Waiting is the part of the time that workers have nothing to do, the mean over workers and seeds, in %. Each rule
runs at several settings in every cell of start, delays and workers. Its curve is the least waiting to be had within
each B, straight between its settings on a scale of log B, and all curves are read at the same B: at 25, 50 and 75 %
of that of `asynchronous`, which never waits. In brackets stands the waiting at the settings on both sides; nothing
after the dots: no setting lies beyond. A dash: no setting of the rule is so consistent. Bold: the least, or less
than a point more.

- B_sup is what `ps-elastic verify` estimates, max over t of sqrt(mean over seeds of (D_t/alpha)^2), t the number of
  the push used. B_max is the largest D/alpha of any push of any seed, B_rms the root mean square of all. Where
  seeds are few, B_sup lies near B_max.
- The task is the quadratic of 4 parameters, alpha = 1/(6L). `training` starts where it starts by default, with
  gradients of norm 11 that fall below the noise of norm 1: views drift straight. `at rest` starts at the optimum:
  noise alone, the hardest case for a rule that adds up norms, since n pushes of noise move the model by about
  sqrt(n) of them.
- D is to each rule's own x_t. To `norm_bounded` that is the model with every owed push in it (x^ideal), so a late
  push counts from the round that owed it. `norm_bounded, x^srv` is the same runs, measured as all others are: on
  the server's model, at the moment when a push is added to it.
- `elastic_bound, exact step` asks for the exact distance of every view after each step that it might make, which
  only a simulation can answer ([_exact_step.py](../../launch/experiments/_exact_step.py)): what is left to gain by
  knowing more.
- `value_bounded` has a constant threshold here. With plain SGD it then makes every decision that `elastic_bound`
  makes with `distance=path` (a test compares them push by push), so its column is that of the path as well.
""".splitlines()

WHY = """\
Why:

- `stale_synchronous` bounds how many pushes a view misses, not how far they lead. Its largest distance comes from
  the first, large gradients, where it does not wait enough, and later it waits as before for motions that hardly
  matter.
- `norm_bounded` by its own x_t need not wait for a straggler: what is owed stands in the ideal model from the round
  that owes it, however late it comes, and only the others' views lack it. `elastic_bound` promises the distance to
  the very model that a push is added to, so once the model has moved by B it must wait for the slowest view. That
  is a difference of promises: on the server's model the same late pushes of `norm_bounded` lie far outside. Its own
  promise is one of expectation, m M/p with the M of the run; that of `elastic_bound` is checked at every push.
- Under noise alone `elastic_bound` holds more than it must: it adds the norms of all that is held to the distance of a
  view, where n pushes of noise move the model by about sqrt(n) of them, and not away from the view. `refreshed` mends
  that for the distance of a view, not for the step to come; the exact step shows what that leaves.
- By B_rms a rule that bounds every push pays for the bound: what matters there is how many workers compute at the
  moment of a step, and rounds that wait for a batch (`norm_bounded`) make fewer and larger steps.
- With equal times the least is `bound=0`, which waits for nobody: all arrive together. Budgets between do wait
  there, when a few of a round are used at once and the rest no longer fit.
""".splitlines()
