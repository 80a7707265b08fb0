"""The reader of ONNX files finds the external tensors that the onnx package finds, and nothing makes it fail badly."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from fedmpt.protocol.onnx_file import (
    MAXIMUM_DEPTH,
    MESSAGES,
    OnnxFileError,
    check_external_data,
    external_tensors,
)

entries = st.lists(
    st.tuples(st.sampled_from(["location", "offset", "length"]), st.text(max_size=8)), max_size=3
)


@st.composite
def tensors(draw):
    tensor = TensorProto(
        name=draw(st.text(max_size=5)),
        data_type=draw(st.integers(0, 30)),
        dims=draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)),
    )
    if draw(st.booleans()):
        tensor.raw_data = draw(st.binary(max_size=20))
        tensor.float_data.extend(draw(st.lists(st.floats(width=32), max_size=3)))
    if draw(st.booleans()):
        tensor.data_location = draw(st.sampled_from([TensorProto.DEFAULT, TensorProto.EXTERNAL]))
        for key, value in draw(entries):
            tensor.external_data.add(key=key, value=value)
    return tensor


sparse = st.builds(
    lambda values, indices: SparseTensorProto(values=values, indices=indices), tensors(), tensors()
)


def graphs(attributes):
    nodes = st.builds(
        lambda name, items: NodeProto(name=name, input=["x", name], attribute=items),
        st.text(max_size=5),
        st.lists(attributes, max_size=2),
    )
    return st.builds(
        lambda node, initializer, few: GraphProto(node=node, initializer=initializer, sparse_initializer=few),
        st.lists(nodes, max_size=2),
        st.lists(tensors(), max_size=2),
        st.lists(sparse, max_size=1),
    )


leaves = st.one_of(
    st.builds(lambda value: AttributeProto(i=value, f=0.5, s=b"text"), st.integers(-(2**63), 2**63 - 1)),
    st.builds(lambda value: AttributeProto(t=value), tensors()),
    st.builds(lambda values: AttributeProto(tensors=values), st.lists(tensors(), max_size=2)),
    st.builds(lambda value: AttributeProto(sparse_tensor=value, sparse_tensors=[value]), sparse),
)
attributes = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda value, more: AttributeProto(g=value, graphs=more),
        graphs(inner),
        st.lists(graphs(inner), max_size=1),
    ),
    max_leaves=4,
)


@st.composite
def models(draw):
    model = ModelProto(ir_version=9, producer_name="p", graph=draw(graphs(attributes)))
    for attribute in draw(st.lists(attributes, max_size=1)):
        function = model.functions.add(name="f")
        function.attribute_proto.append(attribute)
        function.node.add().attribute.append(attribute)
    for graph in draw(st.lists(graphs(attributes), max_size=1)):
        model.training_info.add(initialization=graph, algorithm=graph)
    return model


def found_by_onnx(message):
    """All tensors below a message that are external, by protobuf's own reflection."""
    if isinstance(message, TensorProto):
        if message.external_data or message.data_location == TensorProto.EXTERNAL:
            places = tuple((entry.key, entry.value) for entry in message.external_data)
            yield message.name, message.data_type, tuple(message.dims), places
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                yield from found_by_onnx(item)


@given(models())
def test_it_finds_the_tensors_that_protobuf_finds(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    path.write_bytes(model.SerializeToString())
    found = [
        (tensor.name, tensor.data_type, tensor.shape, tensor.entries) for tensor in external_tensors(path)
    ]
    assert sorted(found) == sorted(found_by_onnx(model))


@given(models(), st.data())
def test_a_damaged_file_is_told_or_read_never_worse(tmp_path_factory, model, data):
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(OnnxFileError):
        list(external_tensors(path))


def test_values_are_skipped_not_read(tmp_path):
    """Weights of 64 MB cost no more than their name."""
    tensor = TensorProto(name="large", data_type=TensorProto.UINT8, dims=[64 << 20], raw_data=bytes(64 << 20))
    path = tmp_path / "model.onnx"
    path.write_bytes(ModelProto(graph=GraphProto(initializer=[tensor])).SerializeToString())
    check_external_data(path)


def test_messages_within_messages_have_an_end(tmp_path):
    content = b""
    for _ in range(MAXIMUM_DEPTH):
        for key in (0x32, 0x2A, 0x0A):  # attribute.g, node.attribute, graph.node
            content = bytes([key]) + onnx_length(len(content)) + content
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x3a" + onnx_length(len(content)) + content)
    with pytest.raises(OnnxFileError, match="nested too deeply"):
        check_external_data(path)


def onnx_length(value):
    """A length as protobuf writes it."""
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x0b\x00", b"\x3a\x7f", b"\x02\x00"])
def test_what_is_no_graph_is_told_with_its_name(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(OnnxFileError, match=r"bad\.onnx: ONNX Runtime cannot open it \(no ONNX graph: "):
        check_external_data(tmp_path / "bad.onnx")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OnnxFileError, match=r"none\.onnx: no such file"):
        check_external_data(tmp_path / "none.onnx")


def test_it_enters_all_that_can_lead_to_a_tensor():
    """The table of the reader is what the onnx package's own definitions say."""
    names = {
        "ModelProto": "model",
        "TrainingInfoProto": "training",
        "FunctionProto": "function",
        "GraphProto": "graph",
        "NodeProto": "node",
        "AttributeProto": "attribute",
        "SparseTensorProto": "sparse",
        "TensorProto": "tensor",
    }
    seen, waiting = {}, [ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name not in seen:
            seen[message.name] = {
                field.number: field.message_type.name for field in message.fields if field.message_type
            }
            waiting += [field.message_type for field in message.fields if field.message_type]
    leading = {"TensorProto"}
    while more := {name for name, fields in seen.items() if leading & set(fields.values())} - leading:
        leading |= more
    expected = {
        names[name]: {number: names[kind] for number, kind in fields.items() if kind in leading}
        for name, fields in seen.items()
        if name in leading - {"TensorProto"}
    }
    assert expected == MESSAGES
    numbers = {name: field.number for name, field in TensorProto.DESCRIPTOR.fields_by_name.items()}
    wanted = {"dims": 1, "data_type": 2, "name": 8, "external_data": 13, "data_location": 14}
    assert {name: numbers[name] for name in wanted} == wanted
