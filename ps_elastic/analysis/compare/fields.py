"""What stands in comparison.json and comparison.csv; the reference pages are made of this (see records.fields)."""

from __future__ import annotations

from ps_elastic.records.fields import Field

_BOTH = "x^srv or x^ideal"  # as the runs of the row say
DOCUMENT = (
    Field("config", "map", "", "the whole configuration that all runs share"),
    Field("workers", "int", "workers", "workers of each run"),
    Field("policies", "list", "", "policies compared, in one-line form"),
    Field("compressors", "list", "", "compressors compared, in one-line form"),
    Field("seeds", "list", "", "seeds of the repetitions"),
    Field("config_file", "text", "", "the configuration file"),
    Field("versions.*", "text?", "", "version of ps_elastic, Python and each package; null if it is not installed"),
    Field("baseline.policy", "text", "", "policy of the row that the others are compared with"),
    Field("baseline.compressor", "text", "", "its compressor"),
    Field("cells", "list", "", "the runs so far"),
    Field("rows", "list", "", "one row for each policy and compressor with a finished run"),
    Field("recommendation.policy", "text?", "", "the fastest row within one point of the best accuracy; null without"),
    Field("recommendation.compressor", "text?", "", "its compressor"),
    Field("recommendation.text", "text", "", "the same in words, with the figures"),
)
CELL = (
    Field("policy", "text", "", "policy, in one-line form"),
    Field("compressor", "text", "", "compressor, in one-line form"),
    Field("seed", "int", "", "seed"),
    Field("run_dir", "text", "", "folder of the run, in that of the comparison"),
    Field("status", "text", "", "`done` or `failed`"),
    Field("exit", "int", "", "exit code of the run"),
    Field("log", "text", "", "file with the output of the run"),
    Field("elapsed_s", "number", "s", "total with start-up", formula="start to end of the job", clock="wall"),
    Field("digest", "text", "", "checksum of the configuration of the run"),
    Field("summary", "map?", "", "its summary.json; null if there is none"),
)
ROW = (
    Field("policy", "text", "", "policy, in one-line form"),
    Field("compressor", "text", "", "compressor, in one-line form"),
    Field("seeds", "list", "", "seeds of the finished runs"),
    Field("accuracy.mean", "number?", "fraction", "accuracy of the final model", formula="mean over seeds"),
    Field("accuracy.sd", "number?", "fraction", "its spread; null with one seed", formula="sd over seeds"),
    Field("loss.mean", "number?", "", "loss of the final model", formula="mean over seeds"),
    Field("loss.sd", "number?", "", "its spread; null with one seed", formula="sd over seeds"),
    Field("wall_s", "number?", "s", "training time", formula="mean over seeds", clock="wall"),
    Field("time_to_target_s", "number?", "s", "time to `train.stop_at`", formula="mean over seeds", clock="server"),
    Field("bytes_up", "number?", "bytes", "arrays from workers to server", formula="mean over seeds"),
    Field("bytes_down", "number?", "bytes", "models from server to workers", formula="mean over seeds"),
    Field("staleness.mean", "number?", "versions", "mean staleness", formula="mean over seeds", model="x^srv"),
    Field("staleness.max", "number?", "versions", "largest staleness", formula="maximum over seeds", model="x^srv"),
    Field("discrepancy.rms", "number?", "parameters", "rms of D", formula="sqrt(mean of rms^2)", model=_BOTH),
    Field("discrepancy.max", "number?", "parameters", "largest D", formula="maximum over seeds", model=_BOTH),
    Field("dropped", "number?", "pushes", "pushes discarded", formula="mean over seeds"),
    Field(
        "wait_share", "number?", "fraction", "wait time %", formula="mean over workers, seeds", clock="worker / server"
    ),
    Field("samples", "number?", "samples", "samples used", formula="mean over seeds"),
    Field("diff.mean", "number?", "fraction", "accuracy minus the baseline's", formula="mean over pairs of one seed"),
    Field("diff.low", "number?", "fraction", "its 95 % interval, lower end; null with 1 pair", formula="Student's t"),
    Field("diff.high", "number?", "fraction", "its 95 % interval, upper end; null with 1 pair", formula="Student's t"),
    Field("discrepancy_of", "text", "", "the model that D is to: `srv`, x^srv; `ideal`, x^ideal"),
)
