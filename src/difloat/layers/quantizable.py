"""The layers of a model that can be quantized, and the blocks that they belong to."""

from __future__ import annotations

from torch import Tensor, nn

from difloat.layers import dtype_readers


def quantizable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of a model that can be quantized, by name in module order.

    >>> list(quantizable(nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Conv2d(4, 4, 3))))
    ['0', '2']

    Subclasses that compute something else in `forward` are not among them. Neither are layers whose weight the parent reads
    without calling them (`nn.MultiheadAttention`), or whose input it casts to the weight's dtype (`dtype_readers.kept`).
    """
    found = {}
    read = dtype_readers.kept(model)
    for name, module in model.named_modules():
        plain_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        plain_conv = isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward
        hidden = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if (plain_linear or plain_conv) and not hidden and name not in read:
            found[name] = module
    return found


def check_weights(model: nn.Module) -> None:
    """Look at every weight that can be quantized.

    Raises:
        ValueError: there is none, or one holds NaN or infinity (the layer is named).
    """
    found = quantizable(model)
    if not found:
        raise ValueError(
            "model must have linear or convolution layers in float, got none; is it quantized already?"
        )
    for name, layer in found.items():
        check_weight(name, layer.weight)


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse the weight of the layer `name` with a ValueError if it holds NaN or infinity."""
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weights must be finite, got NaN or Inf in layer {name!r}; repair the checkpoint")


def places(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every parent and child name under which a module is registered in a model, which is mostly one pair."""
    module = model.get_submodule(name)
    return [
        (parent, child)
        for parent in model.modules()
        for child, registered in parent._modules.items()
        if registered is module
    ]


def blocks(model: nn.Module) -> dict[str, list[str]]:
    """The quantizable layers by the block they belong to, in module order. These are the units of block-wise reconstruction.

    >>> block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> blocks(nn.ModuleDict({"first": nn.Linear(4, 4), "blocks": nn.ModuleList([block])}))
    {'first': ['first'], 'blocks.0': ['blocks.0.0', 'blocks.0.1']}

    A block is an innermost entry of a `ModuleList` or `Sequential` that holds at least two quantizable layers, such as a ResNet
    block or a transformer block. A layer outside of any block is a unit of its own, under its own name.
    """
    layers = quantizable(model)
    containers = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    entries = {
        f"{parent}.{child}" if parent else child
        for parent in containers
        for child, _ in model.get_submodule(parent).named_children()
    }
    members = {entry: [name for name in layers if name.startswith(entry + ".")] for entry in entries}
    members = {entry: names for entry, names in members.items() if len(names) >= 2}
    innermost = {entry for entry in members if not any(other.startswith(entry + ".") for other in members)}
    units: dict[str, list[str]] = {}
    for name in layers:
        owner = next((entry for entry in innermost if name.startswith(entry + ".")), name)
        units.setdefault(owner, []).append(name)
    return units


def inside_blocks(model: nn.Module) -> list[str]:
    """The quantizable layers that belong to an entry of some `ModuleList` or `Sequential`, in module order.

    Layers that a model has once are left out: embedders of the sample, the timestep and the text, and the final projection.
    """
    containers = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    return [
        name for name in quantizable(model) if any(name.startswith(container) for container in containers)
    ]


def staying_float(model: nn.Module) -> dict[str, str]:
    """The reasons, by module name, for which modules with a floating weight of at least two axes cannot be quantized.

    >>> staying_float(nn.Sequential(nn.Embedding(10, 4)))
    {'0': 'stays float: weight of Embedding, no linear layer and no two-dimensional convolution'}

    Such modules are torch's own attention, transposed, one- and three-dimensional convolutions, stacks of experts, embeddings,
    and subclasses of linear layers with a forward pass of their own. Layers of `quantizable` and those that are quantized
    already are not among them. The model itself has the empty name.
    """
    possible, read = quantizable(model), dtype_readers.kept(model)
    found = {}
    for name, module in model.named_modules():
        if name in possible or isinstance(module, dtype_readers.HoldsPackedWeight):
            continue
        own = [
            key for key, p in module.named_parameters(recurse=False) if p.is_floating_point() and p.dim() >= 2
        ]
        if not own:
            continue
        kind = type(module).__name__
        if name in read:
            found[name] = read[name]
        elif isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            found[name] = "stays float: the module around it reads this weight without calling the layer"
        elif isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = f"stays float: {kind} has a forward pass of its own"
        else:
            found[name] = (
                f"stays float: {', '.join(own)} of {kind}, no linear layer and no two-dimensional convolution"
            )
    return found
