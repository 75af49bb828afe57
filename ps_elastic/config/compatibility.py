"""Which choices of a configuration do not go together, and which this version cannot carry out: refused by name."""

from __future__ import annotations

from functools import reduce
from typing import Any

from ps_elastic.config.plugin import registry
from ps_elastic.config.schema import Config
from ps_elastic.errors import ConfigError
from ps_elastic.plugins import show
from ps_elastic.policies import Policy, policies


class _Refusals(list[ConfigError]):
    """What does not fit in one configuration; called with a condition for each pair of choices."""

    def __init__(self, config: Config) -> None:
        self.config, self.policy = config, f"policy {config.policy.text()}"

    def __call__(self, ok: bool, key: str, text: str, subject: str = "") -> None:
        """Unless `ok`, refuse the value of `key`: `got VALUE, {text}`, or `{subject} {text}`."""
        if not ok:
            got: Any = reduce(dict.__getitem__, key.split("."), self.config.to_dict())
            self.append(ConfigError(f"{subject or f'got {show(got)},'} {text}", key=key))


def misfits(config: Config) -> list[ConfigError]:
    """Every pair of choices in `config` that does not fit, with the reason; each by itself is known to be good."""
    policy: Policy = config.policy.build()
    units: str = config.update.plugin.build().units
    refuse = _Refusals(config)
    _policy_and_update(refuse, config, policy, units)
    _policy_and_optimizer(refuse, config, policy)
    _policy_and_tracker(refuse, config, policy)
    _layers(refuse, config, policy)
    if config.update.pipeline:
        _running_ahead(refuse, config, policy, units)
    if config.views == "torn":
        _torn_views(refuse, config, policy)
    if config.writers == "workers":
        _writing_workers(refuse, config, policy)
    else:
        refuse(config.writing == "lock", "writing", "expected lock: it is for writers: workers")
    if units != "gradient":
        reason = f"{config.update.plugin.name} pushes in units of {units}, which the server uses as they are"
        _plain_sgd(refuse, config, reason)
    if units == "model":
        _models_and_compressor(refuse, config)
    return refuse


def _policies(having: str) -> str:
    return ", ".join(name for name, cls in policies.items() if getattr(cls, having))


def _policy_and_update(refuse: _Refusals, config: Config, policy: Policy, units: str) -> None:
    updates = ", ".join(name for name, cls in registry("update").items() if cls.units in policy.units)
    takers = ", ".join(name for name, cls in policies.items() if units in cls.units)
    text = (
        f"pushes in units of {units}, but policy {config.policy.name} takes {' or '.join(policy.units)} "
        f"(updates: {updates}); policies that take {units}: {takers}"
    )
    refuse(units in policy.units, "update.name", text, config.update.plugin.name)


def _policy_and_optimizer(refuse: _Refusals, config: Config, policy: Policy) -> None:
    text = (
        f"but what {refuse.policy} bounds or applies late is only known with {' or '.join(policy.optimizers)}, "
        "whose steps are linear in the gradient"
    )
    refuse(config.optimizer.name in policy.optimizers, "optimizer.name", text)


def _policy_and_tracker(refuse: _Refusals, config: Config, policy: Policy) -> None:
    mode, key = config.tracker.discrepancy, "tracker.discrepancy"
    if policy.needs_views or policy.own_views:
        refuse(mode == "exact", key, f"but {refuse.policy} needs each worker's copy of the model; expected exact")
    elif policy.view_of == "ideal":
        reason = "applies gradients late, and step lengths say nothing of the model that includes them"
        refuse(mode != "bound", key, f"but {refuse.policy} {reason}; expected exact or off")


def _layers(refuse: _Refusals, config: Config, policy: Policy) -> None:
    """What goes with layers alone, and what does not go with them."""
    update, name = config.update, config.update.plugin.name
    if update.plugin.build().cut_s is not None:
        others = f"but {refuse.policy} takes whole pushes; policies that take layers: {_policies('layerwise')}"
        refuse(policy.layerwise, "update.name", f"sends the layers that it came to, {others}", name)
        reason = f"{name} would leave a layer with the gradient of some of the batches"
        refuse(update.accumulate == 1, "update.accumulate", f"expected 1: {reason}")
    if policy.layerwise:
        reason = "the layers that a worker has queued would belong to different pushes"
        refuse(policy.jobs <= 1, "policy.name", f"takes layers and queues jobs: {reason}", refuse.policy)
        reason = f"it measures the gain of sending during backward, and layers of {refuse.policy} leave after it"
        refuse(config.buckets != "auto", "buckets", f"expected layer or a number of bytes: {reason}")


def _running_ahead(refuse: _Refusals, config: Config, policy: Policy, units: str) -> None:
    """A worker re-applies alpha/p times its own pushes under way: what else has to be so for that to make sense."""
    pipeline, key = config.update.pipeline, "update.pipeline"
    expected = f"expected 0, or one of the policies that use every push alone as it comes: {_policies('pipelines')}"
    text = f"but under {refuse.policy} a worker needs the reply before it continues; {expected}"
    refuse(policy.pipelines, key, text)
    longest = policy.longest_pipeline() if policy.pipelines else pipeline
    refuse(pipeline <= longest, key, f"expected at most {longest:g} with {refuse.policy}")
    refuse(units != "model", key, "expected 0: of models pushed none adds to another")
    reason = (
        f"with update.pipeline = {pipeline} a worker re-applies alpha/p times its own pushes under way, "
        "and that is not what this optimizer makes of them"
    )
    refuse(config.optimizer.name == "sgd", "optimizer.name", f"expected sgd: {reason}")
    fits = config.transport != "shared" or config.writers == "workers"
    reason = f"shared memory takes one push of a worker, and update.pipeline = {pipeline} leaves several under way"
    refuse(fits, "transport", f"expected auto or messages: {reason}")
    fault = next((name for name in ("lost_push", "lost_reply") if getattr(config.faults, name)), None)
    refuse(not fault, key, f"expected 0 with faults.{fault}: workers continue without reply only if nothing gets lost")


def _torn_views(refuse: _Refusals, config: Config, policy: Policy) -> None:
    """What does not fit inconsistent reads (`views: torn`): copies read while the model is written."""
    unknown = "and with views: torn the server knows nothing of a worker's copy before its push; expected exact"
    why = _why_exact(policy)
    refuse(not why, "views", f"but {refuse.policy} {why}, {unknown}")
    reason = "reads are inconsistent where workers read the memory that the server writes"
    refuse(config.transport != "messages", "transport", f"expected auto or shared: {reason}")
    reason = "with views: torn a worker leaves the one copy that it used in shared memory, unless workers write"
    fits = config.update.pipeline == 0 or config.writers == "workers"
    refuse(fits, "update.pipeline", f"expected 0: {reason}")
    text = "changes the copy of the model that it pulled, which with views: torn must stay as it was for the server"
    refuse(not config.update.plugin.build().moves, "update.name", text, config.update.plugin.name)
    reason = "with views: torn workers compute on copies in the memory of the host"
    refuse(config.computes_on_cpu, "device", f"expected cpu: {reason}")


def _why_exact(policy: Policy) -> str:
    """Why `policy` needs copies of the model that are known when they are sent, or ""."""
    reasons = (
        (policy.layerwise, "takes the layers of a push one by one, each with its own copy of the model"),
        (policy.jobs > 1, "queues jobs with the model of their assignment"),
        (policy.own_views, "gives each worker a model of its own"),
        (policy.bounds_views, "promises how far the workers' copies are from the model"),
        (policy.needs_views, "needs each worker's copy of the model"),
        (policy.view_of == "ideal", "measures the copies of workers that still compute"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _writing_workers(refuse: _Refusals, config: Config, policy: Policy) -> None:
    """What does not fit workers that write the model themselves."""
    reason = "workers that write the model change it while others read it"
    refuse(config.views == "torn", "writers", f"expected server, or views: torn with it: {reason}")
    expected = f"expected server, or one of the policies that use every push, each with 1/p: {_policies('adds')}"
    text = f"but what they have written {refuse.policy} can neither discard nor weigh; {expected}"
    refuse(policy.adds, "writers", text)
    reason = "a worker that writes the model adds alpha/p times its own push to it, and knows of no other"
    _plain_sgd(refuse, config, reason)


def _plain_sgd(refuse: _Refusals, config: Config, reason: str) -> None:
    refuse(config.optimizer.name == "sgd", "optimizer.name", f"expected sgd: {reason}")
    refuse(config.optimizer.momentum == 0, "optimizer.momentum", f"expected 0: {reason}")
    refuse(config.optimizer.weight_decay == 0, "optimizer.weight_decay", f"expected 0: {reason}")


def _models_and_compressor(refuse: _Refusals, config: Config) -> None:
    reason = f"{config.update.plugin.name} pushes models, of which no part can be left for the next push"
    whole, feedback = config.compressor.plugin.name == "identity", config.compressor.error_feedback
    refuse(whole, "compressor.name", f"expected identity: {reason}")
    fits = not whole or feedback is not True  # of another compressor that is said once
    refuse(fits, "compressor.error_feedback", f"expected auto or false: {reason}")


def refuse_alone(config: Config) -> None:
    """Raise ConfigError for inconsistent reads (`views: torn`) where no ranks share memory: one process, a replay."""
    if config.views == "torn":
        raise ConfigError(
            "got 'torn', expected exact: only ranks that share memory read the model while it is written "
            "(`ps-elastic launch`), or workers in simulated time (`ps-elastic simulate`)",
            key="views",
        )


def unsupported(config: Config, simulated: bool = False) -> list[ConfigError]:
    """Every value of `config` that this version cannot carry out, with what to write instead."""
    faults = {} if simulated else config.faults.to_dict()
    every = config.checkpoint.every_samples
    cases: list[tuple[str, Any, Any, str]] = [  # key, its value, the only one supported, why
        ("downlink", config.downlink.name, "identity", "models travel whole; expected identity"),
        ("faults", faults, {}, "faults happen in `ps-elastic simulate` only; expected {}"),
        ("checkpoint.every_samples", every, None, "no checkpoints are written yet; expected null"),
        ("survive.respawn", config.survive.respawn, 0, "lost workers are not replaced yet; expected 0"),
    ]
    if config.train.autocast == "float16":
        why = "it needs a scaled loss, without which small gradients are 0; expected bfloat16 or null"
        cases.append(("train.autocast", "float16", None, why))
    return [
        ConfigError(f"got {show(got)}, which this version does not support: {reason}", key=key)
        for key, got, only, reason in cases
        if got != only
    ]
