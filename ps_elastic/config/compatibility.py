"""Which choices of a configuration do not go together, and which this version cannot carry out: refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ps_elastic.config.plugin import registry
from ps_elastic.errors import ConfigError
from ps_elastic.plugins import show
from ps_elastic.policies import policies

if TYPE_CHECKING:
    from ps_elastic.config.schema import Config
    from ps_elastic.policies import Policy


def misfits(config: Config) -> Iterator[ConfigError]:
    """Every pair of choices in `config` that does not fit, with the reason; each by itself is known to be good."""
    policy: Policy = config.policy.build()
    units: str = config.update.plugin.build().units
    yield from _rule_and_update(config, policy, units)
    yield from _rule_and_optimizer(config, policy)
    yield from _rule_and_tracker(config, policy)
    yield from _layers(config, policy)
    if config.update.pipeline:
        yield from _running_ahead(config, policy, units)
    if config.views == "torn":
        yield from torn_misfits(config, policy)
    if config.writers == "workers":
        yield from writers_misfits(config, policy)
    elif config.writing != "lock":
        yield ConfigError("got 'plain', expected lock: it is for writers: workers", key="writing")
    if units != "gradient":
        yield from _update_and_optimizer(config, units)
    if units == "model":
        yield from _models_and_compressor(config)


def _rule_and_update(config: Config, policy: Policy, units: str) -> Iterator[ConfigError]:
    if units in policy.units:
        return
    fitting = ", ".join(name for name, cls in registry("update").items() if cls.units in policy.units)
    rules = ", ".join(name for name, cls in policies.items() if units in cls.units)
    yield ConfigError(
        f"{config.update.plugin.name} pushes in units of {units}, but policy {config.policy.name} takes "
        f"{' or '.join(policy.units)} (updates: {fitting}); rules that take {units}: {rules}",
        key="update.name",
    )


def _rule_and_optimizer(config: Config, policy: Policy) -> Iterator[ConfigError]:
    name = config.optimizer.name
    if name not in policy.optimizers:
        yield ConfigError(
            f"got {show(name)}, but what policy {config.policy.text()} bounds or repays is only known with "
            f"{' or '.join(policy.optimizers)}, whose steps are linear in the gradient",
            key="optimizer.name",
        )


def _rule_and_tracker(config: Config, policy: Policy) -> Iterator[ConfigError]:
    mode = config.tracker.discrepancy
    rule = f"got {show(mode)}, but policy {config.policy.text()}"
    if mode != "exact" and (policy.needs_views or policy.own_views):
        yield ConfigError(f"{rule} works with the views themselves; expected exact", key="tracker.discrepancy")
    elif mode == "bound" and policy.view_of == "ideal":
        reason = "repays debts, and path lengths say nothing of the model with all debts settled"
        yield ConfigError(f"{rule} {reason}; expected exact or off", key="tracker.discrepancy")


def _layers(config: Config, policy: Policy) -> Iterator[ConfigError]:
    """What goes with layers alone, and what does not go with them."""
    update, rule = config.update, f"policy {config.policy.text()}"
    if update.plugin.build().cut_s is not None:
        if not policy.layerwise:
            rules = ", ".join(name for name, cls in policies.items() if cls.layerwise)
            yield ConfigError(
                f"{update.plugin.name} sends the layers that it came to, but {rule} takes whole pushes; "
                f"rules that take layers: {rules}",
                key="update.name",
            )
        if update.accumulate > 1:
            reason = f"{update.plugin.name} would leave a layer with the gradient of some of the batches"
            yield ConfigError(f"got {update.accumulate}, expected 1: {reason}", key="update.accumulate")
    if not policy.layerwise:
        return
    if policy.jobs > 1:
        reason = "the layers that a worker has queued would belong to different pushes"
        yield ConfigError(f"{rule} takes layers and queues jobs: {reason}", key="policy.name")
    if config.buckets == "auto":
        reason = f"it measures what buckets gain that leave during backward, and those of {rule} leave behind it"
        yield ConfigError(f"got 'auto', expected layer or a number of bytes: {reason}", key="buckets")


def _running_ahead(config: Config, policy: Policy, units: str) -> Iterator[ConfigError]:
    """A worker re-applies alpha/p times its own pushes under way: what else has to be so for that to make sense."""
    pipeline, key = config.update.pipeline, "update.pipeline"
    if not policy.pipelines:
        rules = ", ".join(name for name, cls in policies.items() if cls.pipelines)
        yield ConfigError(
            f"got {pipeline}, but under policy {config.policy.text()} a worker must have its answer before it goes on; "
            f"expected 0, or one of the rules that use every push by itself as it comes: {rules}",
            key=key,
        )
    elif pipeline > policy.longest_pipeline():
        most = f"{policy.longest_pipeline():g}"
        yield ConfigError(f"got {pipeline}, expected at most {most} with policy {config.policy.text()}", key=key)
    if units == "model":
        yield ConfigError(f"got {pipeline}, expected 0: of models pushed none adds to another", key=key)
    if config.optimizer.name != "sgd":
        yield ConfigError(
            f"got {show(config.optimizer.name)}, expected sgd: with update.pipeline = {pipeline} a worker re-applies "
            "alpha/p times its own pushes under way, and that is not what this optimizer makes of them",
            key="optimizer.name",
        )
    if config.transport == "shared" and config.writers == "server":
        reason = f"a window holds one push of a worker, and update.pipeline = {pipeline} leaves several under way"
        yield ConfigError(f"got 'shared', expected auto or messages: {reason}", key="transport")
    lossy = [name for name in ("lost_push", "lost_reply") if getattr(config.faults, name)]
    if lossy:
        yield ConfigError(
            f"got {pipeline}, expected 0 with faults.{lossy[0]}: workers run ahead only where nothing gets lost",
            key=key,
        )


def _update_and_optimizer(config: Config, units: str) -> Iterator[ConfigError]:
    optimizer = config.optimizer
    reason = f"{config.update.plugin.name} pushes in units of {units}, which the server uses as they are"
    if optimizer.name != "sgd":
        yield ConfigError(f"got {show(optimizer.name)}, expected sgd: {reason}", key="optimizer.name")
    for key in ("momentum", "weight_decay"):
        if value := getattr(optimizer, key):
            yield ConfigError(f"got {show(value)}, expected 0: {reason}", key=f"optimizer.{key}")


def _models_and_compressor(config: Config) -> Iterator[ConfigError]:
    compressor = config.compressor
    reason = f"{config.update.plugin.name} pushes models, of which no part can be left for the next push"
    if compressor.plugin.name != "identity":
        yield ConfigError(f"got {show(compressor.plugin.name)}, expected identity: {reason}", key="compressor.name")
    elif compressor.error_feedback is True:
        yield ConfigError(f"got true, expected auto or false: {reason}", key="compressor.error_feedback")


def torn_misfits(config: Config, policy: Policy) -> Iterator[ConfigError]:
    """Everything in `config` that does not fit torn views, with the reason."""
    if reason := _why_exact(policy):
        yield ConfigError(
            f"got 'torn', but policy {config.policy.text()} {reason}, and of a torn view the server knows nothing "
            "before its push; expected exact",
            key="views",
        )
    if config.transport == "messages":
        reason = "views are torn where workers read the memory that the server writes"
        yield ConfigError(f"got 'messages', expected auto or shared: {reason}", key="transport")
    if config.update.pipeline and config.writers == "server":
        reason = "with views: torn a worker leaves the one copy that it used in shared memory, unless workers write"
        yield ConfigError(f"got {config.update.pipeline}, expected 0: {reason}", key="update.pipeline")
    if config.update.plugin.build().moves:
        reason = "moves the copy of the model that it pulled, which with views: torn is to stay for the server to see"
        yield ConfigError(f"{config.update.plugin.name} {reason}", key="update.name")
    if not config.computes_on_cpu:
        reason = "with views: torn workers compute on copies in the memory of the host"
        yield ConfigError(f"got {show(config.device)}, expected cpu: {reason}", key="device")


def writers_misfits(config: Config, policy: Policy) -> Iterator[ConfigError]:
    """Everything in `config` that does not fit workers which write the model themselves, with the reason."""
    if config.views != "torn":
        reason = "workers that write the model change it while others read it"
        yield ConfigError(f"got 'workers', expected server, or views: torn with it: {reason}", key="writers")
    if not policy.adds:
        rules = ", ".join(name for name, cls in policies.items() if cls.adds)
        yield ConfigError(
            f"got 'workers', but what they have written policy {config.policy.text()} can neither drop nor weigh; "
            f"expected server, or one of the rules that use every push, each with 1/p: {rules}",
            key="writers",
        )
    optimizer = config.optimizer
    reason = "a worker that writes the model adds alpha/p times its own push to it, and knows of no other"
    if optimizer.name != "sgd":
        yield ConfigError(f"got {show(optimizer.name)}, expected sgd: {reason}", key="optimizer.name")
    for key in ("momentum", "weight_decay"):
        if value := getattr(optimizer, key):
            yield ConfigError(f"got {show(value)}, expected 0: {reason}", key=f"optimizer.{key}")


def refuse_alone(config: Config) -> None:
    """Raise ConfigError for torn views where no ranks share memory: in one process, in a replay."""
    if config.views == "torn":
        raise ConfigError(
            "got 'torn', expected exact: only ranks that share memory read the model while it is written "
            "(`ps-elastic launch`), or workers in virtual time (`ps-elastic simulate`)",
            key="views",
        )


def _why_exact(policy: Policy) -> str:
    """Why `policy` needs views that are known when they are given, or ""."""
    if policy.layerwise:
        return "takes the layers of a push by themselves, each with a view of its own"
    if policy.jobs > 1:
        return "queues jobs with the model of their assignment"
    if policy.own_views:
        return "gives each worker a model of its own"
    if policy.bounds_views:
        return "promises how far views are from the model"
    if policy.needs_views:
        return "works with the views themselves"
    if policy.view_of == "ideal":
        return "measures the views of workers that still compute"
    return ""


def unsupported(config: Config, simulated: bool = False) -> list[ConfigError]:
    """Every value of `config` that this version cannot carry out, with what to write instead."""
    checkpoint, survive = config.checkpoint, config.survive
    cases = [
        (
            config.downlink.name != "identity",
            "downlink",
            config.downlink.name,
            "models travel whole; expected identity",
        ),
        (
            bool(config.faults) and not simulated,
            "faults",
            config.faults.to_dict(),
            "faults happen in `ps-elastic simulate` only; expected {}",
        ),
        (
            checkpoint.every_samples is not None,
            "checkpoint.every_samples",
            checkpoint.every_samples,
            "no checkpoints are written yet; expected null",
        ),
        (survive.respawn > 0, "survive.respawn", survive.respawn, "lost workers are not replaced yet; expected 0"),
    ]
    return [
        ConfigError(f"got {show(got)}, which this version does not support: {reason}", key=key)
        for applies, key, got, reason in cases
        if applies
    ]
