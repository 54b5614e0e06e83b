"""The network as a graph that can be narrowed: torch.export's ATen graph with its parameters under their own
names.

torch.export specialises all Python control flow, so what remains is a flat list of tensor operations with
every constant (sizes of views, splits, slices) in plain sight. Surgery rewrites those constants; a narrowed
nn.Module could not run code like ``x.view(b, 2, 32, h, w)`` any more.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from edgeprune.data.errors import EdgePruneError

aten = torch.ops.aten

BATCH = 2  # the batch that shapes and labels are worked out with; 1 would look like a broadcast


class UnsupportedNetwork(EdgePruneError):
    """The network does something that cannot be followed; nothing was changed."""


class Network(fx.GraphModule):
    """An ATen graph that is called like the module it was traced from, with the same parameter names.

    train() and eval() switch the batch norm and dropout operations, which carry their mode as an argument,
    except those that run in training mode always (instance norm without running statistics).
    """

    input_shapes: tuple[tuple[int, ...], ...]  # without the batch
    kept: dict[str, tuple[int, ...]]  # layer -> surviving original channels, for layers that lost some
    added_biases: tuple[str, ...]

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        changed = False
        for node in self.graph.nodes:
            position = _MODE_ARGUMENT.get(node.target)
            if position is not None and not node.meta.get("one_mode") and node.args[position] != mode:
                node.update_arg(position, mode)
                changed = True
        if changed:
            self.recompile()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return assemble(copy.deepcopy(dict(tensors(self)), memo), copy_graph(self.graph), self)

    def example(self, batch: int = BATCH, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        return tuple(torch.zeros(batch, *shape, device=device) for shape in self.input_shapes)


_MODE_ARGUMENT: dict[Any, int] = {
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
}


def trace(module: nn.Module, *example: Tensor) -> Network:
    """Trace `module` on one or more `(N, ...)` inputs; sizes other than the batch become constants.

    The module's own parameters are copied: neither it nor its mode changes. A parameter that the forward
    pass does not use is left out; a tied one keeps its first name.

    Raises:
        UnsupportedNetwork: If torch.export cannot follow the forward pass, or it does something in place that
            is seen through another tensor.
    """
    modes = [(part, part.training) for part in module.modules()]
    first_name = {id(parameter): name for name, parameter in module.named_parameters()}
    original = {name: parameter for name, parameter in module.named_parameters(remove_duplicate=False)}
    batch = torch.export.Dim("batch", min=1, max=2**20)
    inputs = tuple(value[:1].repeat(BATCH, *(1 for _ in value.shape[1:])) for value in example)
    sizes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for value in inputs:
        sizes[value] = {0: batch}
    module.eval()
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False)  # type: ignore[arg-type]
    except Exception as error:  # torch.export raises many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedNetwork(
            f"{type(module).__name__}: its forward pass cannot be traced by torch.export ({reason}); "
            "the forward pass must work for any batch size and must not branch on tensor values"
        ) from error
    finally:
        for part, mode in modes:
            part.training = mode
    graph = _plain_graph(program)
    values: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = node.target
            value = program.state_dict[name] if name in program.state_dict else program.constants[name]
            if isinstance(value, nn.Parameter):
                parameter = original[name]
                node.target = name = first_name[id(parameter)]  # a tied parameter has one name
                values[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            else:
                values[name] = value.detach().clone()
    _make_functional(graph)
    for node in graph.nodes:
        if node.target in _MODE_ARGUMENT and node.args[_MODE_ARGUMENT[node.target]]:
            node.meta["one_mode"] = True
    graph.lint()
    network = assemble(values, graph, None)
    network.input_shapes = tuple(tuple(value.shape[1:]) for value in inputs)
    network.kept = {}
    network.added_biases = ()
    network.train(module.training)
    return network


def assemble(values: Mapping[str, Tensor], graph: fx.Graph, like: Network | None) -> Network:
    """A network of a graph and its parameters and buffers by name; the rest is as in `like`."""
    root = nn.Module()
    for name, value in values.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
    network = Network(root, graph)
    if like is not None:
        network.input_shapes, network.kept = like.input_shapes, dict(like.kept)
        network.added_biases = like.added_biases
        nn.Module.train(network, like.training)
    return network


def copy_graph(graph: fx.Graph) -> fx.Graph:
    duplicate = fx.Graph()
    result = duplicate.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    duplicate.output(result[0])
    for old, new in zip(graph.nodes, duplicate.nodes, strict=True):
        new.meta = dict(old.meta)
    return duplicate


def tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def layer_of(name: str) -> str:
    """The layer that a weight belongs to: its module, or the weight itself if its module may have several."""
    return name.removesuffix(".weight")


def argument(node: fx.Node, name: str) -> Any:
    """An operation's argument by its name in the schema; None if it is not given and has no default."""
    schema = node.target._schema  # type: ignore[union-attr]
    for position, declared in enumerate(schema.arguments):
        if declared.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[position] if position < len(node.args) else declared.default_value
    return None


def operation(node: fx.Node) -> str:
    """An ATen operation's name without its overload; empty for what is none."""
    return str(getattr(getattr(node.target, "_schema", None), "name", "")).removeprefix("aten::")


def where(node: fx.Node) -> str:
    """Module and operation of a node, for messages."""
    stack = [
        path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if not path.startswith("_empty")
    ]
    return f"{stack[-1] if stack and stack[-1] else 'forward'}: {str(node.target).removeprefix('aten.')}"


def shapes(network: Network, batch: int = BATCH) -> dict[fx.Node, Any]:
    """Every node's result as fake tensors (shapes without data)."""
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(value.detach()) for name, value in tensors(network)}
    values: dict[fx.Node, Any] = {}
    inputs = iter(network.example(batch))
    with mode, torch.no_grad():
        for node in network.graph.nodes:
            values[node] = _run(node, values, fakes, lambda: mode.from_tensor(next(inputs)))
    return values


def _run(
    node: fx.Node, values: Mapping[fx.Node, Any], fakes: Mapping[str, Tensor], take: Callable[[], Any]
) -> Any:
    if node.op == "placeholder":
        return take()
    if node.op == "get_attr":
        return fakes[str(node.target)]
    if node.op == "output":
        return None
    arguments = fx.map_arg(node.args, lambda n: values[n])
    keywords = fx.map_arg(node.kwargs, lambda n: values[n])
    assert callable(node.target)
    return node.target(*arguments, **keywords)


def _plain_graph(program: torch.export.ExportedProgram) -> fx.Graph:
    """torch.export's graph with parameters as get_attr nodes and outputs in the module's own structure."""
    signature = program.graph_signature
    attribute = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            mutated = len(signature.buffers_to_mutate) + len(signature.user_inputs_to_mutate)
            results = fx.map_arg(node.args[0], lambda n: mapped[n])[mutated:]
            assert program.call_spec.out_spec is not None
            graph.output(pytree.tree_unflatten(list(results), program.call_spec.out_spec))
        elif node.op == "placeholder" and node.name in attribute:
            if node.users:
                mapped[node] = graph.get_attr(attribute[node.name])
        elif node.op in ("placeholder", "call_function"):
            if node.op == "call_function" and "_guard" in str(node.target):
                continue
            mapped[node] = graph.node_copy(node, lambda n: mapped[n])
        else:
            raise UnsupportedNetwork(
                f"{where(node)}: control flow that depends on tensor values cannot be pruned"
            )
        if node in mapped:
            mapped[node].meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
    graph.eliminate_dead_code()
    return graph


_MAY_ALIAS = frozenset(["reshape", "flatten", "contiguous", "to", "dropout", "feature_dropout"])


def _make_functional(graph: fx.Graph) -> None:
    """Replace operations in place by their twins (scores are taken from tensors that must not change)."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        name = operation(node)
        changed = node.args[0]
        twin = getattr(getattr(aten, name.removesuffix("_"), None), node.target._overloadname, None)
        seen = any(order[user] > order[node] for alias in _aliases(changed, node) for user in alias.users)
        if not name.endswith("_") or twin is None or changed.op == "get_attr" or seen:
            raise UnsupportedNetwork(f"{where(node)}: what it changes in place is used elsewhere")
        node.target = twin
        changed.replace_all_uses_with(
            node, lambda user, here=node: user is not here and order.get(user, 0) > order[here]
        )


def _aliases(changed: fx.Node, by: fx.Node) -> set[fx.Node]:
    """Other nodes whose memory may be that of `changed`, without what follows `by`."""
    root = changed
    while (base := _base(root)) is not None:
        root = base
    found, pending = {root}, [root]
    while pending:
        node = pending.pop()
        views = [user for user in node.users if user is not by and user not in found and _base(user) is node]
        found.update(views)
        pending += views
    return found - {changed}


def _base(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one's result shares."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    schema = getattr(node.target, "_schema", None)
    shares = node.target is operator.getitem or operation(node) in _MAY_ALIAS
    if schema is not None:
        shares = shares or any(result.alias_info is not None for result in schema.returns)
    return node.args[0] if shares else None
