"""mergekit in process, for comparison: its run, and its plan tensor by tensor."""

# pyright: reportPrivateUsage=false
# What its planner resolves can be read nowhere else.

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solera_core.context import Context
from solera_merge.config import MergeConfig
from solera_merge.methods.catalogue import METHODS
from solera_merge.plan import make_plan

UNUSED = {
    "": {"int8_mask"},  # no mask is stored
    "task_arithmetic": {"density", "rescale"},  # mergekit resolves it, and trims nothing
}
"""Parameters that mergekit resolves and that change nothing here, by method ("": all)."""


@dataclass(frozen=True)
class Planned:
    """One tensor of an output.

    Attributes:
        sources: (model, tensor) in the order of the recipe, without the base.
        base: (model, tensor) where the method has a base.
        shared: parameters by name.
        per_model: parameters by name, a value a source.
    """

    method: str
    sources: tuple[tuple[str, str], ...]
    base: tuple[str, str] | None
    shared: dict[str, Any]
    per_model: dict[str, tuple[Any, ...]]


def run_mergekit(content: dict[str, Any], out: Path, *, seed: int = 0) -> None:
    """Through its own command's function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mergekit and its dependencies warn about is theirs
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

        options = MergeOptions(quiet=True, write_model_card=False, random_seed=seed)
        run_merge(MergeConfiguration.model_validate(copy.deepcopy(content)), str(out), options)


def plan_of_mergekit(content: dict[str, Any]) -> dict[str, Planned]:
    """What its planner resolves, by tensor of the output; optional tensors that no model has are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.architecture import get_architecture_info
        from mergekit.config import MergeConfiguration
        from mergekit.io.tasks import LoaderCache
        from mergekit.merge import MergeOptions, _model_out_config
        from mergekit.plan import MergePlanner

        config = MergeConfiguration.model_validate(copy.deepcopy(content))
        options = MergeOptions(quiet=True)
        architecture = get_architecture_info(config, options)
        LoaderCache().setup(options=options)
        planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
        planner._plan()
    found: dict[str, Planned] = {}
    for _, planned in planner._tensors:
        task: Any = planned
        gathered = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)  # behind a vocabulary
        names = {model: weight.name for model, weight in gathered.weight_info.items()}
        base = task.base_model if METHODS[task.method_name].base != "unused" else None
        models = [model for model in task.model_order if model != base]
        given = {model: dict(task.input_parameters[model].items()) for model in models}
        unused = UNUSED[""] | UNUSED.get(task.method_name, set())
        found[task.output_weight.name] = Planned(
            task.method_name,
            tuple((str(model), names[model]) for model in models),
            None if base is None else (str(base), names[base]),
            {name: value for name, value in task.parameters.items() if name not in unused},
            {
                # `scale` of passthrough: none is 1
                name: tuple(1.0 if given[model][name] is None else given[model][name] for model in models)
                for name in given[models[0]]
                if name not in unused
            },
        )
    return found


def plan_of_solera(config: MergeConfig) -> dict[str, Planned]:
    """The same of solera's plan."""
    plan, models = make_plan(config, Context())
    found: dict[str, Planned] = {}
    for tensor in plan.tensors:
        parameters = METHODS[tensor.method].parameters
        values = {name: value for name, value in tensor.parameters.items() if name not in UNUSED[""]}
        found[tensor.name] = Planned(
            tensor.method,
            tuple((models.ref(s.model), s.name) for s in tensor.models),
            None if tensor.base is None else (models.ref(tensor.base.model), tensor.base.name),
            {name: value for name, value in values.items() if not parameters[name].per_model},
            {name: value for name, value in values.items() if parameters[name].per_model},
        )
    return found
