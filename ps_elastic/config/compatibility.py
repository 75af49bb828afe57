"""Whether rule, update, optimizer, compressor and tracker of a configuration fit together: refused by name if not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ps_elastic.config.torn_fits import torn_misfits, writers_misfits
from ps_elastic.errors import ConfigError
from ps_elastic.policies import policies
from ps_elastic.values import show

if TYPE_CHECKING:
    from ps_elastic.config.load import Config
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
    from ps_elastic.worker.updates import updates  # torch comes with it

    if units in policy.units:
        return
    fitting = ", ".join(name for name, cls in updates.items() if cls.units in policy.units)
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
