"""Put your own part into a finished model, and see where two models part.

Two tools for learners: ``swap`` makes a model in which your function or module does the work of
the package's, and ``explain_divergence`` runs two models side by side and names the first module
that differs. Every chapter that builds a part uses both.
"""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from .checkpoints import PretrainedModel

# Function of the package -> the modules that call it by that name.
FUNCTIONS = {
    "apply_rotary": ("attention",),
    "rotate_half": ("attention",),
    "gated_linear_unit": ("geglu",),
    "rotary_table": ("model",),
    "inverse_frequencies": ("model",),
    "eager_attention": ("alternating_attention",),
    "window_mask": ("alternating_attention",),
    "padded_mask": ("alternating_attention",),
}
INSIDE_LAYERS = ("apply_rotary", "rotate_half", "gated_linear_unit")
# Part of the model -> its place; {i} is the number of the layer.
MODULES = {
    "embeddings": "embeddings",
    "layer": "layers.{i}",
    "attn_norm": "layers.{i}.attn_norm",
    "attn": "layers.{i}.attn",
    "mlp_norm": "layers.{i}.mlp_norm",
    "mlp": "layers.{i}.mlp",
    "final_norm": "final_norm",
    "head": "head",
}
ALIASES = {"rope": "apply_rotary", "attention": "attn", "geglu": "mlp"}


def swap(
    model: nn.Module, part: str, own: Callable, layers: Iterable[int] | None = None
) -> nn.Module:
    """Make a model in which ``own`` stands for a part; the given model stays as it is.

    Both models share their weights: training one trains the other.

    Args:
        model: one of this package's models.
        part: a function of the package ("apply_rotary", "rotate_half", "rotary_table",
            "inverse_frequencies", "gated_linear_unit", "eager_attention", "window_mask",
            "padded_mask"), or a module ("embeddings", "attn_norm", "attn", "mlp_norm", "mlp",
            "layer", "final_norm", "head"). "rope" is short for "apply_rotary".
        own: a function in place of a function, with the same arguments or the first few of them.
            In place of a module: a class that is built as
            the package's is, with those arguments that its ``__init__`` names, and takes over the
            weights; or a function ``f(self, x, …)`` that becomes the module's ``forward``.
        layers: numbers of the layers to change; by default all that have the part. Layer 0 has
            no ``attn_norm``: name it to give it one.

    Returns:
        The new model, in the same mode (training or evaluation).

    Raises:
        ValueError: for a part that does not exist, or ``own`` whose weights do not fit.
    """
    part = ALIASES.get(part, part)
    if not callable(own):
        raise ValueError(f"own is {own!r}; a function or a class is expected")
    shared = {id(parameter): parameter for parameter in model.parameters()}
    result = copy.deepcopy(model, shared)
    encoder = getattr(result, "model", result)
    if part in FUNCTIONS:
        _swap_function(encoder, part, own, layers)
    elif part in MODULES:
        _swap_modules(result if part == "head" else encoder, part, own, layers)
    else:
        raise ValueError(f"no part {part!r}; there are {', '.join([*FUNCTIONS, *MODULES])}")
    return result


def _swap_function(encoder: nn.Module, name: str, own: Callable, layers: Iterable[int] | None):
    if name not in INSIDE_LAYERS and layers is not None:
        raise ValueError(f"{name} is called once for all layers: leave `layers` out")
    if name == "eager_attention":
        encoder.attn_implementation = "eager"
    elif name in ("window_mask", "padded_mask"):
        encoder.attn_implementation = "sdpa"  # a packed stream has a band in place of masks
    owners = [importlib.import_module(f"{__package__}.{module}") for module in FUNCTIONS[name]]
    if name == "rotate_half":  # the package has it folded into apply_rotary
        name, own = "apply_rotary", partial(_turn_by, own)
    places = encoder.layers if name in INSIDE_LAYERS else [encoder]
    numbers = range(len(places)) if layers is None else _checked(layers, len(places))
    fitted = _with_fewer_arguments(own)
    for i in numbers:
        inner = type(places[i]).forward
        _give_forward(places[i], partial(_run_with, owners, name, fitted, inner))


def _with_fewer_arguments(own: Callable) -> Callable:
    """Let ``own`` leave out arguments of the package's function, such as ``device``."""
    try:
        known = inspect.signature(own).parameters.values()
    except ValueError:  # a function of torch, written in another language
        return own
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in known):
        return own
    count = sum(p.kind is not p.KEYWORD_ONLY for p in known)
    names = {p.name for p in known}

    @functools.wraps(own)
    def fitted(*inputs, **named):
        return own(*inputs[:count], **{n: v for n, v in named.items() if n in names})

    return fitted


def _turn_by(rotate_half: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary`` as the textbook has it."""
    wide = x.float()
    return (wide * cos + rotate_half(wide) * sin).to(x.dtype)


def _run_with(owners, name, own, inner, *inputs, **named):
    """Run ``inner`` while the package's function ``name`` is the learner's."""
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(patch.object(owner, name, own))
        return inner(*inputs, **named)


def _give_forward(module: nn.Module, forward: Callable) -> None:
    # A class of its own and not an attribute of the object: a copy must run its own parts.
    kind = type(module)

    def run(self, *inputs, **named):
        return forward(self, *inputs, **named)

    module.__class__ = type(kind.__name__, (kind,), {"forward": run, "__module__": kind.__module__})


def _swap_modules(root: nn.Module, part: str, own: Callable, layers: Iterable[int] | None):
    place = MODULES[part]
    if "{i}" not in place:
        if layers is not None:
            raise ValueError(f"there is one {part} in the model: leave `layers` out")
        numbers = [0]
    elif layers is None:
        names = [place.format(i=i) for i in range(len(root.layers))]
        numbers = [
            i for i, n in enumerate(names) if not isinstance(root.get_submodule(n), nn.Identity)
        ]
    else:
        numbers = _checked(layers, len(root.layers))
    for i in numbers:
        name = place.format(i=i)
        try:
            old = root.get_submodule(name)
        except AttributeError:
            raise ValueError(f"a {type(root).__name__} has no {part}") from None
        if inspect.isclass(own):
            root.set_submodule(name, _build(own, old, root.config, part, i))
        else:
            _give_forward(old, own)


def _checked(layers: Iterable[int], count: int) -> list[int]:
    numbers = list(layers)
    if wrong := [i for i in numbers if not 0 <= i < count]:
        raise ValueError(f"no layer {wrong[0]}; the model has layers 0 to {count - 1}")
    return numbers


def _build(own: type, old: nn.Module, config: Any, part: str, index: int) -> nn.Module:
    """Make the learner's module as the package makes its own, and hand it the old weights."""
    kind = {"attn": "attention", "mlp": "mlp"}.get(part, "norm" if "norm" in part else "classifier")
    offered = {
        "config": config,
        "index": index,
        "hidden_size": config.hidden_size,
        "normalized_shape": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "activation": config.hidden_activation,
        "eps": config.norm_eps,
        "bias": getattr(config, f"{kind}_bias"),
        "dropout": getattr(config, f"{kind}_dropout", 0.0),
    }
    asked = inspect.signature(own).parameters.values()
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in asked if p.default is p.empty and p.kind not in fixed]
    if unknown := [name for name in needed if name not in offered]:
        raise ValueError(
            f"{own.__name__} asks for {unknown[0]!r}; swap can give it {', '.join(offered)}"
        )
    new = own(**{p.name: offered[p.name] for p in asked if p.name in offered})
    weights = dict(old.named_parameters())
    if weights:
        _take_over(new, weights, own.__name__)
    else:  # where there was nothing, such as the norm of layer 0, its own starting values stay
        new.to(next(iter(new.parameters()), torch.empty(0)).dtype)
    return new.train(old.training)


def _take_over(new: nn.Module, weights: dict[str, nn.Parameter], name: str) -> None:
    mine = {n: tuple(p.shape) for n, p in new.named_parameters()}
    theirs = {n: tuple(p.shape) for n, p in weights.items()}
    if mine != theirs:
        raise ValueError(
            f"{name} has the weights {_listed(mine)}; the checkpoint has {_listed(theirs)}. "
            "Names and shapes must be the same."
        )
    new.load_state_dict(weights, strict=False, assign=True)


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "(none)"


# --- Where two models part --------------------------------------------------------------------


@dataclass
class Stage:
    """One stage of a run: how far apart what enters it and what leaves it lies.

    Attributes:
        name: of the module, or of what is handed to the layers.
        entering: largest difference of the hidden states that go in; None where there are none.
        leaving: the same of what comes out.
        agrees: whether ``leaving`` is within the tolerance.
        entered_alike: whether ``entering`` is.
    """

    name: str
    entering: float | None
    leaving: float
    agrees: bool
    entered_alike: bool


@dataclass
class Divergence:
    """What ``explain_divergence`` found; it has printed it already.

    Attributes:
        stages: all of them, in the order in which they finish.
        first: name of the first stage that differs, nearly always a module; None where none does.
        verdict: the finding in words.
    """

    stages: list[Stage]
    first: str | None
    verdict: str
    table: str = field(repr=False)

    def _ipython_display_(self) -> None:
        """Nothing more: a cell that ends in the call shows what the call printed."""


def explain_divergence(
    mine: nn.Module,
    reference: nn.Module,
    text: str | list[str] | Mapping[str, torch.Tensor],
    tokenizer: Callable | None = None,
    tolerance: float = 1e-5,
) -> Divergence:
    """Run two models on the same text and print where they part, stage by stage.

    The first module that differs is the first one into which the same goes and out of which
    something else comes. Padding positions are left out of every comparison.

    Args:
        mine: the model in doubt.
        reference: the model to trust: one of this package, or of ``transformers``.
        text: one text, several, or what a tokenizer made of them.
        tokenizer: by default that of "mini".
        tolerance: a stage agrees where its largest difference is at most this, times the largest
            absolute value of the reference's stage where that is above 1.

    Raises:
        ValueError: where a tokenizer is needed, or the models have no stage in common.
    """
    batch = _encode(text, reference, tokenizer)
    runs = [_record(model, batch) for model in (mine, reference)]
    real = batch["attention_mask"].bool() if "attention_mask" in batch else None
    stages = [
        _compare(name, *(run[name] for run in runs), real, tolerance)
        for name in runs[1]
        if name in runs[0]
    ]
    if not any(stage.name.startswith("layers.") for stage in stages):
        raise ValueError("the two models have no layer in common")
    guilty = next((s for s in stages if s.entered_alike and not s.agrees), None)
    first = guilty and guilty.name
    verdict = _verdict(stages, guilty, mine, reference)
    result = Divergence(stages, first, verdict, _table(stages, first))
    print(result.table, verdict, sep="\n")
    return result


def _encode(text, model: nn.Module, tokenizer) -> dict[str, torch.Tensor]:
    if not isinstance(text, str | list | tuple):
        encoded = dict(text)
    else:
        if tokenizer is None:
            from .tokenizer import Tokenizer

            tokenizer = Tokenizer.from_pretrained("mini")
            if len(tokenizer) != model.config.vocab_size:
                raise ValueError(
                    f"the model knows {model.config.vocab_size} tokens, mini's tokenizer "
                    f"{len(tokenizer)}: pass `tokenizer=`"
                )
        texts = [text] if isinstance(text, str) else list(text)
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}


Record = dict[str, tuple[torch.Tensor | None, torch.Tensor]]


@torch.no_grad()
def _record(model: nn.Module, batch: dict[str, torch.Tensor]) -> Record:
    """What enters and what leaves each module, in the order in which they finish."""
    found: Record = {}

    def enter(name, layer, inputs, named):
        kind = getattr(layer, "kind", getattr(layer, "attention_type", None))
        found[f"kind of {name}"] = (None, torch.tensor([kind == "sliding_attention"]))
        for what, value in _handed_to_layer(inputs, named).items():
            found[f"{what} of {name}"] = (None, value)

    def leave(name, module, inputs, named, output):
        value = _tensor(output)
        if value is not None:
            entered = _tensor((*inputs, named.get("hidden_states"), named.get("input_ids")))
            found[name] = (entered, value)

    hooks = []
    for name, module in model.named_modules():
        name = name.removeprefix("model.")
        if name.startswith("layers.") and name.count(".") == 1:
            hook = partial(enter, name)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if name not in ("", "model"):
            hooks.append(module.register_forward_hook(partial(leave, name), with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    try:
        padded = {"keep_padded": True} if isinstance(model, PretrainedModel) else {}
        output = model.eval()(**batch, **padded)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    found["output"] = (None, _tensor(output))
    return found


def _handed_to_layer(inputs: tuple, named: dict) -> dict[str, torch.Tensor]:
    """Rotary table and mask, as this package hands them to a layer and as transformers does."""
    x = _tensor(inputs)
    tables = named.get("position_embeddings") or [i for i in inputs[1:] if torch.is_tensor(i)]
    attend = next((i for i in inputs if isinstance(i, partial)), None)
    mask = attend.keywords.get("mask") if attend else named.get("attention_mask")
    length = x.shape[-2]
    seen = torch.ones(1, 1, length, length, dtype=torch.bool) if mask is None else mask
    seen = seen if seen.dtype == torch.bool else seen == 0  # a mask to add hides by −inf
    found = {"mask": seen.expand(*(1,) * (4 - seen.dim()), *seen.shape)}
    if len(tables) == 2:
        found["rotary table"] = torch.stack([t.float().reshape(-1, *t.shape[-2:]) for t in tables])
    return found


def _tensor(value: Any) -> torch.Tensor | None:
    """The hidden states, or the scores, among what a module takes or gives."""
    if torch.is_tensor(value):
        return value
    for name in ("logits", "start_logits", "last_hidden_state"):
        if torch.is_tensor(getattr(value, name, None)):
            return getattr(value, name)
    if isinstance(value, tuple):
        return next((item for item in value if torch.is_tensor(item)), None)
    return None


def _compare(name: str, mine: tuple, theirs: tuple, real, tolerance: float) -> Stage:
    entering, alike = None, True
    if mine[0] is not None and theirs[0] is not None:
        entering, alike = _distance(mine[0], theirs[0], real, tolerance)
    leaving, agrees = _distance(mine[1], theirs[1], real, tolerance)
    return Stage(name, entering, leaving, agrees, alike)


def _distance(a: torch.Tensor, b: torch.Tensor, real, tolerance: float) -> tuple[float, bool]:
    """max |Δ| over the real tokens, and whether it is within the tolerance."""
    a, b = a.double(), b.double()
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return float("inf"), False
    if real is not None:
        if a.shape[:2] == real.shape:
            a, b = a[real], b[real]
        elif a.dim() == 4 and a.shape[-1] == real.shape[1]:  # a mask: rows of padding show nothing
            rows = real[:, None, :, None]
            a, b = (x * rows for x in (a, b))
    distance = (a - b).abs().nan_to_num(nan=torch.inf).max().item()
    return distance, distance <= tolerance * max(1.0, b.abs().max().item())


def _verdict(stages, guilty, mine, reference) -> str:
    largest = max(stage.leaving for stage in stages)
    if guilty is None:
        size = f"at most {largest:.1e}" if largest else "exactly 0"
        return f"The models agree: max |Δ| is {size} in all {len(stages)} stages."
    if guilty.name.startswith("kind of "):
        return (
            f"First difference: the {guilty.name}\n"
            "One is global, the other local: compare `layer_types` of the two configs."
        )
    if " of " in guilty.name:
        return (
            f"First difference: the {guilty.name}\n"
            "No module is to blame: this is made before the layers run, and handed to them."
        )
    lines = [f"First module that differs: {guilty.name}"]
    inside = [s for s in stages if s.name.startswith(guilty.name + ".")]
    if guilty.entering is not None:
        lines.append("The same goes in, something else comes out.")
    if inside:
        alike = [s.name for s in inside if s.entered_alike and s.agrees]
        other = [s.name for s in inside if not s.entered_alike]
        if alike and other:
            lines.append(f"Inside it {alike[-1]} still agrees, and {other[0]} gets something else:")
            lines.append("look at what happens between the two.")
        elif alike:
            lines.append(f"Inside it all agree, up to {alike[-1]}: look at what comes after.")
    lines += _weights_that_differ(guilty.name, mine, reference)
    return "\n".join(lines)


def _weights_that_differ(name: str, mine: nn.Module, reference: nn.Module) -> list[str]:
    found = []
    theirs = {n.removeprefix("model."): p for n, p in reference.named_parameters()}
    for n, p in mine.named_parameters():
        n = n.removeprefix("model.")
        other = theirs.get(n)
        if n.startswith(name + ".") and other is not None:
            if p.shape != other.shape:
                found.append(f"Its weight {n} has another shape: {tuple(p.shape)}.")
            elif not torch.equal(p, other):
                gap = (p.double() - other.double()).abs().max()
                found.append(f"Its weight {n} differs: max |Δ| {gap:.1e}.")
    return found


def _table(stages: list[Stage], first: str | None) -> str:
    """The stages in a table: the layers, and what lies inside the one that matters."""
    opened = ".".join(first.rpartition(" of ")[2].split(".")[:2]) if first else "nothing"
    rows = []
    for stage in stages:
        handed = " of " in stage.name
        deep = stage.name.count(".") > (1 if stage.name.startswith("layers") else 0)
        if (
            handed
            and stage.agrees
            and (stage.name.startswith("kind") or not stage.name.endswith(" layers.0"))
        ):
            continue
        if deep and not handed and not stage.name.startswith(opened + "."):
            continue
        if stage.name.endswith("drop"):  # does nothing in evaluation mode
            continue
        mark = "  ← first" if stage.name == first else ""
        rows.append((stage.name, f"{stage.leaving:.1e}" if stage.leaving else "0", mark))
    width = max(len(name) for name, _, _ in rows)
    head = f"{'stage':<{width}}  max |Δ|"
    return "\n".join([head, *(f"{n:<{width}}  {d:>7}{mark}" for n, d, mark in rows)])
