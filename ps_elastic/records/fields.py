"""What stands in a run's folder: every file, and every field of it. The reference pages are made of this.

A field is named by its path: `staleness.mean`, and `*` for keys that differ from run to run. Tests hold the files that
runs write against it: no field is missing here, and none is here that no run writes.
"""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
    """A number or a text that is written. type: see TYPES, with `?` if it may be null.

    when: the runs that have it, if not all do. The rest is for measured numbers: formula, clock, reference model.
    """

    name: str
    type: str
    unit: str
    meaning: str
    when: str = ""
    formula: str = ""
    clock: str = ""
    model: str = ""


class File(NamedTuple):
    """A file of the folder. fields: of the document, or of each line; lines: event -> further fields of its line."""

    name: str
    what: str
    fields: tuple[Field, ...] = ()
    lines: dict[str, tuple[Field, ...]] = {}  # noqa: RUF012  # a constant


TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "number": (int, float), "text": (str,), "bool": (bool,), "list": (list,), "map": (dict,)
}  # fmt: skip
_MPI, _SIMULATED, _LAYERS = "under MPI", "simulated", "layer-wise policy"
_SERVER, _WORKER, _WALL = "server", "worker", "wall"
_BOTH = "x^srv or x^ideal"
_X, _IDEAL = "x^srv", "x^ideal"

_WORKER_STEP = (
    Field("worker", "int", "rank", "the worker"),
    Field("step", "int", "worker steps", "which of its gradients, from 1"),
)
_BUCKET = Field("bucket", "int", "", "the part of the model", _LAYERS)
_LINE = (
    Field("event", "text", "", "kind of the line"),
    Field("t_s", "number", "s", "time from the start of the run", formula="time since the start", clock=_SERVER),
    Field("rank", "int", "rank", "the rank that writes the line"),
)
_APPLIED = (
    Field("version", "int", "versions", "the server's model from now on"),
    Field("moved", "number", "gradient", "step length", formula="‖x_new - x_old‖ / alpha", model=_X),
    Field("alpha", "number", "step size", "step size alpha of the step"),
    Field("coast", "number", "gradient", "remaining momentum motion: what the next step moves without a gradient"),
    Field("gain", "number", "", "momentum gain: what a gradient of norm 1 adds to the next step"),
    Field("rounding", "number", "gradient", "what float32 may add to the largest move of the next step"),
)

_USED = (
    *_WORKER_STEP,
    Field("base", "int", "versions", "base version: that of the worker's copy of the model"),
    Field("version", "int", "versions", "the server's version that the step began from"),
    Field("x", "text", "", "reference model of the line: `srv`, or `ideal`, which includes late gradients"),
    Field("staleness", "int", "versions", "staleness tau of the gradient", formula="version - base", model=_X),
    Field(
        "discrepancy", "number?", "parameters", "discrepancy D at use; null with `tracker.discrepancy: off`",
        formula="D = ‖x - v‖; with `tracker.discrepancy: bound` the value of `path_length`", model=_BOTH,
    ),
    Field("B", "number?", "gradient", "D/alpha of the push", formula="D / (largest alpha since the copy)", model=_BOTH),
    Field("step_size", "number", "step size", "step size alpha of the step", formula="learning rate x schedule"),
    Field(
        "path_length", "number?", "parameters", "cumulative step length from copy to use; at least D of x^srv",
        formula="SUM ‖x_{s+1} - x_s‖, rounded up", model=_X,
    ),
    Field("norm", "number?", "push", "norm of what the worker computed", formula="‖g‖"),
    Field("payload_norm", "number?", "push", "norm of what the server decodes", formula="‖decode(encode(g + e))‖"),
    Field("residual_norm", "number?", "push", "norm of what error feedback keeps", formula="‖e_new‖"),
    Field("weight", "number", "", "weight in the mean", formula="weight / SUM of weights; the weight itself in a sum"),
    Field("share", "number", "", "step scale: it multiplies the learning rate"),
    _BUCKET,
)  # fmt: skip
_OUTCOME = Field("outcome", "text", "", "`used`, `dropped` (discarded), or `held` (kept for later)")
_KNOWN = Field(
    "discrepancy", "number?", "parameters", "D of the push, as the server tells; null if it is not known",
    formula="D = ‖x - v‖", model=_BOTH,
)  # fmt: skip
_REPLY = (
    Field("step", "int", "worker steps", "the last gradient that this reply answers"),
    Field("version", "int", "versions", "the model that came with the reply"),
    _KNOWN,
    Field(
        "moved", "number?", "parameters",
        "distance to the reply: what other workers changed meanwhile, exact with plain SGD; null if it is not measured",
        formula="‖x_reply + own update - v‖", model=_X,
    ),
    Field("residual_norm", "number", "push", "norm of what error feedback keeps", formula="‖e_new‖"),
    _OUTCOME,
    Field("compute_s", "number", "s", "time of the gradient", formula="batch, forward, backward", clock=_WORKER),
    Field("encode_s", "number", "s", "time of the compressor", formula="encoding of all buckets", clock=_WORKER),
    Field("send_s", "number", "s", "time of sending", formula="hand-over to the transport", clock=_WORKER),
    Field("wait_s", "number", "s", "time of waiting", formula="end of sending to next model", clock=_WORKER),
)  # fmt: skip
_SETTLED = (
    Field("step", "int", "worker steps", "an earlier gradient, whose outcome was not known in its reply"),
    Field("outcome", "text", "", "`used` or `dropped` (discarded)"),
    _KNOWN,
    _BUCKET,
)

ACTIONS: dict[str, tuple[Field, ...]] = {  # what follows the name in an item of `actions`
    "step": (
        Field(
            "terms", "list", "", "`[worker, step, weight, stands_for]` of each push; a placeholder stands for a push"
        ),
        Field("share", "number", "", "step scale"),
        Field("combine", "text", "", "`mean`, `sum` or another aggregation"),
        Field("apply", "text", "", "`step`, `amend` (a late correction) or `assign`"),
    ),
    "drop": (*_WORKER_STEP, Field("reason", "text", "", "why the push is discarded")),
    "release": (
        Field("workers", "list", "ranks", "who gets the model and continues"),
        Field("own", "number", "", "weight of the worker's own gradient in the model that it gets"),
    ),
    "wake": (Field("at", "number", "s", "when the policy is to be asked again", clock=_SERVER),),
    "measure": (Field("pushes", "list", "", "`[worker, step]` of each worker's copy to be measured"),),
    "applied": _APPLIED,
    "measured": (*_WORKER_STEP, Field("distance", "number", "gradient", "‖x - v‖ / (largest alpha since the copy)")),
}
_EVENTS: dict[str, tuple[Field, ...]] = {
    "push": (
        *_WORKER_STEP,
        Field("base", "int", "versions", "base version"),
        Field("norm", "number", "push", "norm of what the worker computed"),
        Field("payload_norm", "number", "push", "norm of what the server decodes"),
        Field("residual_norm", "number", "push", "norm of what error feedback keeps"),
        Field("nbytes", "int", "bytes", "size of the arrays"),
        Field("units", "text", "", "push type: `gradient`, `update` (model difference) or `model`"),
        Field("ahead", "int", "pushes", "earlier pushes without reply when it was computed", "pipelining"),
    ),
    "asked": (Field("worker", "int", "rank", "who sends a retry request"), _WORKER_STEP[1]),
    "joined": (
        Field("worker", "int", "rank", "a new worker, or one that comes back"),
        Field("step", "int", "worker steps", "its gradients are numbered on from here"),
    ),
    "left": (Field("worker", "int", "rank", "a worker that is gone for good"),),
    "woke": (),
    "done": (),
    "applied": _APPLIED,
}
_ENV = (
    Field("workers", "int", "workers", "workers at the start"),
    Field("recomputable", "bool", "", "whether `replay --recompute` can repeat the run bit for bit"),
    Field("versions.*", "text", "", "version of ps_elastic, Python and each package"),
    Field("host", "text", "", "name of the server's host"),
    Field("platform", "text", "", "operating system"),
    Field("processor", "text", "", "vector instructions that PyTorch uses"),
    Field("cuda", "bool", "", "whether PyTorch finds a GPU"),
    Field("cores", "int", "cores", "cores that the server's process may use"),
    Field("kernels", "text", "", "the numba kernels in use, or why there are none"),
    Field("torch_threads", "int", "threads", "threads of PyTorch on the server"),
    Field("threads.*", "text?", "threads", "environment variables that limit threads; null if unset"),
    Field("command", "list", "", "the command line"),
    Field(
        "searched",
        "list",
        "",
        "folders where `module:Class` was looked for: the current one, that of the configuration",
    ),
    Field("transport", "text", "", "`in process` or `simulated`", "not under MPI"),
    Field("transport.*", "text", "", "of each worker: `shared` or `messages`", _MPI),
    Field("mpi", "text", "", "the MPI library", _MPI),
    Field("waiting", "text", "", "wake-up method of a rank that waits", _MPI),
    Field("headers_only", "bool", "", "whether it is a timing-only simulation", _SIMULATED),
)
_SUMMARY = (
    Field("name", "text", "", "name of the run"),
    Field("policy", "text", "", "policy, with the settings that differ from the defaults"),
    Field("compressor", "text", "", "compressor, likewise"),
    Field("task", "text", "", "task, likewise"),
    Field("workers", "int", "workers", "workers at the start"),
    Field("seed", "int", "", "seed"),
    Field("wall_s", "number", "s", "training time", formula="first model sent to last exit message", clock=_WALL),
    Field("samples", "int", "samples", "samples used", formula="SUM over pushes used"),
    Field("samples_computed", "int", "samples", "samples of all pushes", formula="SUM over pushes received"),
    Field("pushes", "int", "pushes", "pushes received", formula="count"),
    Field("used", "int", "pushes", "pushes used", formula="count"),
    Field("dropped", "int", "pushes", "pushes discarded, those at the end of the run included", formula="count"),
    Field("held_max", "int", "pushes", "most pushes that the server kept at once", formula="maximum"),
    Field("bytes_up", "int", "bytes", "arrays from workers to server", formula="SUM of `nbytes`, without metadata"),
    Field("bytes_down", "int", "bytes", "models from server to workers", formula="4 x parameters for each model sent"),
    Field("staleness.mean", "number?", "versions", "mean staleness", formula="mean of `staleness`", model=_X),
    Field("staleness.max", "number?", "versions", "largest staleness", formula="maximum of `staleness`", model=_X),
    Field("discrepancy.rms", "number?", "parameters", "rms of D", formula="sqrt(mean of D^2)", model=_BOTH),
    Field("discrepancy.max", "number?", "parameters", "largest D", formula="maximum of D", model=_BOTH),
    Field("B_rms", "number?", "gradient", "rms of D/alpha", formula="sqrt(mean of `B`^2)", model=_BOTH),
    Field("B_max", "number?", "gradient", "largest D/alpha", formula="maximum of `B`", model=_BOTH),
    Field("shared_steps", "int", "server steps", "cooperative steps: workers could make a part", formula="count"),
    Field(
        "shared_by_workers", "number?", "fraction", "fraction of these steps that workers made; null without any",
        formula="blocks made by workers / all blocks",
    ),
    Field(
        "wait_share.*", "number?", "fraction", "of each worker: fraction of the run that it waited (wait time %)",
        formula="SUM of `wait_s` / length of the run", clock="worker / server",
    ),
    Field("metrics.*", "number?", "", "the last evaluation: `loss`, `accuracy`, and what else the task returns"),
    Field(
        "time_to_target_s", "number?", "s", "when `train.stop_at` was reached; null if it was not",
        formula="time at which the model evaluated was made", clock=_SERVER,
    ),
    Field("stop_at", "text?", "", "the target, as `train.stop_at` states it"),
    Field("versions", "int", "versions", "server steps made, late corrections included", formula="count"),
    Field("snapshots_max", "int?", "models", "most older versions kept at once; null in a timing-only simulation"),
    Field(
        "B_theory", "number?", "gradient", "the constant B that the policy declares; null if it declares none",
        formula="`B_theory_text` states it", model="that of the policy",
    ),
    Field("B_theory_kind", "text?", "", "`declared`, or `observed` if tau or a count in it comes from the run"),
    Field(
        "bound_holds", "bool?", "",
        "below bound or not; null without a constant or a measured D, or if a late gradient was larger than M",
        formula="B_rms <= B_theory; on every push, if the policy promises that", model="that of the policy",
    ),
    Field("B_theory_text", "text", "", "the formula, its numbers and its conditions, or why there is no constant"),
    Field("B_residual", "map?", "", "null without error feedback"),
    Field("B_residual.rms", "number?", "gradient", "rms norm of residuals", "error feedback", "sqrt(mean of ‖e‖^2)"),
    Field(
        "B_residual.theory", "number?", "gradient", "their bound; gamma is the share of energy lost", "error feedback",
        "sqrt(gamma) / (1 - sqrt(gamma)) x rms norm of the gradients",
    ),
    Field("lost_workers", "list", "ranks", "workers that were lost"),
    Field("parameters_sha256", "text?", "", "checksum of the final parameters; null if there is no final model"),
    Field("exit", "int", "", "exit code"),
    Field("error", "text", "", "why the run ended, or which check failed", "exit code not 0"),
    Field("record.config_sha256", "text", "", "checksum of config.yaml"),
    Field("record.events", "int", "lines", "lines of events.jsonl"),
    Field("record.events_sha256", "text", "", "checksum of events.jsonl"),
    Field("virtual_s", "number", "s", "length of the run", _SIMULATED, "time of the last event", "simulated"),
    Field("cpu_s", "number", "s", "time that the simulator took", _SIMULATED, "time of its processor", "processor"),
    Field("headers_only", "bool", "", "whether it is a timing-only simulation", _SIMULATED),
    Field("pushes_per_s", "number?", "pushes/s", "speed of the simulator", _SIMULATED, "pushes / wall_s", _WALL),
)  # fmt: skip

FILES = (
    File("config.yaml", "The whole configuration, every default stated. To train it again repeats the run."),
    File("env.json", "Where the run ran: versions, machine, threads and transport.", _ENV),
    File(
        "events.jsonl", "The run log: what the policy saw, and what it ordered. It holds no gradient and no model.",
        (
            *_LINE,
            Field("actions", "list", "", "what the policy ordered, with the answers `applied` and `measured`"),
            Field("ignored", "text", "", "why the event changed nothing, such as `duplicate`", "ignored events"),
            _BUCKET,
            Field("buckets", "int", "", "how many parts there are; in the first line of each", _LAYERS),
            Field("closed", "list", "", "`[worker, step]` of each late gradient that will not come", "late gradients"),
        ),
        _EVENTS,
    ),
    File(
        "metrics/rank-000.jsonl", "The server's metrics.", _LINE,
        {
            "used": _USED,
            "dropped": (*_WORKER_STEP, Field("reason", "text", "", "why the push is discarded"), _BUCKET),
            "evaluated": (
                Field("samples", "int", "samples", "samples used by the model evaluated"),
                Field("version", "int", "versions", "its version"),
                Field("*", "number?", "", "what the task's `evaluate` returns: `loss`, `accuracy`, ..."),
            ),
        },
    ),
    File(
        "metrics/rank-NNN.jsonl", "A worker's metrics; not in a timing-only simulation.",
        (_LINE[0], _LINE[1]._replace(clock=_WORKER), _LINE[2]),
        {"reply": _REPLY, "settled": _SETTLED},
    ),
    File("model.safetensors", "The final model: parameters and buffers by name; not in a timing-only simulation."),
    File("summary.json", "What the run came to.", _SUMMARY),
    File("interrupt", "The exit code that the launcher asked for; only after Ctrl-C or SIGTERM."),
    File("job.sbatch", "The batch script of `submit`."),
    File("slurm-*.out", "The output of the SLURM job."),
    File("output.log", "The output of a run of `compare`."),
)  # fmt: skip
