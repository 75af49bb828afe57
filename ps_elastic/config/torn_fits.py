"""What goes with views that are read while the model is written (`views: torn`), and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ps_elastic.errors import ConfigError
from ps_elastic.policies import policies
from ps_elastic.values import show

if TYPE_CHECKING:
    from ps_elastic.config.load import Config
    from ps_elastic.policies import Policy


def torn_misfits(config: Config, policy: Policy) -> Iterator[ConfigError]:
    """Everything in `config` that does not fit torn views, with the reason."""
    from ps_elastic.runtime.build import computes_on_cpu  # torch comes with it

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
    if not computes_on_cpu(config):
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
