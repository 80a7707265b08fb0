"""A graph names a file of this machine as the place of a tensor: its bytes would go out in the next update.

These tests run with every ONNX Runtime that can be installed, also 1.23.2 under Python 3.10 (see ``.ci/run``), which
reads what such a graph asks for.
"""

import dataclasses
import importlib.resources
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedmpt.cli.main import main
from fedmpt.edge_client.engine import open_engine
from fedmpt.edge_client.onnx_session import SessionError, import_onnxruntime, is_confined, open_session
from fedmpt.edge_client.tagger import Tagger
from fedmpt.protocol.files import sha256_file
from fedmpt.protocol.manifest import load_manifest, save_manifest, verify_bundle
from fedmpt.protocol.onnx_file import OnnxFileError, check_external_data

SECRET = b"-----BEGIN PRIVATE KEY-----\n" * 4
SHAPE = [len(SECRET)]


@pytest.fixture
def secret(tmp_path):
    """A file of this machine that is none of a bundle's."""
    path = tmp_path / "home" / "site.key"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def bundle(tmp_path):
    """A copy of the bundle that the demo uses."""
    with importlib.resources.as_file(
        importlib.resources.files("fedmpt.simulation") / "data/demo-bundle"
    ) as shipped:
        return shutil.copytree(shipped, tmp_path / "bundle")


def external(location, **entries):
    """A tensor of bytes that are kept at ``location``."""
    tensor = TensorProto(name="stolen", data_type=TensorProto.UINT8, dims=SHAPE)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": str(location), **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def as_initializer(tensor):
    return model([], [tensor])


def as_constant(tensor):
    return model([helper.make_node("Constant", [], ["stolen"], value=tensor)])


def in_a_branch(tensor):
    inner = helper.make_graph(
        [], "inner", [], [helper.make_tensor_value_info("stolen", TensorProto.UINT8, SHAPE)], [tensor]
    )
    yes = numpy_helper.from_array(np.array(True), "yes")
    return model([helper.make_node("If", ["yes"], ["stolen"], then_branch=inner, else_branch=inner)], [yes])


def in_a_function(tensor):
    opset = [helper.make_opsetid("", 18)]
    body = [helper.make_node("Constant", [], ["stolen"], value=tensor)]
    made = model([helper.make_node("Take", [], ["stolen"], domain="local")])
    made.functions.append(helper.make_function("local", "Take", [], ["stolen"], body, opset))
    made.opset_import.append(helper.make_opsetid("local", 1))
    return made


def as_sparse_values(tensor):
    made = model([])
    indices = numpy_helper.from_array(np.arange(SHAPE[0]), "indices")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, SHAPE))
    return made


def in_training_information(tensor):
    made = model([])
    made.training_info.add().initialization.initializer.append(tensor)
    return made


WAYS = [as_initializer, as_constant, in_a_branch, in_a_function, as_sparse_values, in_training_information]


def model(nodes, initializers=()):
    """A model whose output is the tensor ``stolen``."""
    output = helper.make_tensor_value_info("out", TensorProto.UINT8, SHAPE)
    nodes = [*nodes, helper.make_node("Identity", ["stolen"], ["out"])]
    graph = helper.make_graph(nodes, "theft", [], [output], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def saved(folder, made, name="graph.onnx"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(made.SerializeToString())
    return folder / name


def hostile(bundle, tensor, graph="train_step"):
    """The bundle with one more initializer in a graph, and a manifest that says that all is well."""
    manifest = load_manifest(bundle)
    path = bundle / manifest.graphs[graph].file
    altered = onnx.load(path, load_external_data=False)
    altered.graph.initializer.append(tensor)
    altered.graph.node.append(helper.make_node("Identity", ["stolen"], ["gone"]))
    path.write_bytes(altered.SerializeToString())
    save_manifest(
        bundle, dataclasses.replace(manifest, files={**manifest.files, path.name: sha256_file(path)})
    )
    return bundle


def test_the_attack_is_real_where_onnx_runtime_does_not_refuse_by_itself(tmp_path, secret):
    onnxruntime = import_onnxruntime()
    path = saved(tmp_path / "graphs", as_initializer(external(secret)))
    if is_confined(onnxruntime):
        with pytest.raises(Exception, match=r"(?i)external"):
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    else:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert session.run(None, {})[0].tobytes() == SECRET


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["absolute", "relative", "beside", "link"])
def test_a_graph_reads_no_other_file(tmp_path, secret, way, place):
    folder = tmp_path / "graphs"
    folder.mkdir()
    (folder / "beside.bin").write_bytes(SECRET)
    (folder / "link.bin").symlink_to(secret)
    location = {
        "absolute": secret,
        "relative": "../home/site.key",
        "beside": "beside.bin",
        "link": "link.bin",
    }[place]
    path = saved(folder, way(external(location)))
    with pytest.raises(
        SessionError, match=f"tensor 'stolen' wants its data from the file '.*{location}'.*no other"
    ):
        open_session(path, "cpu")


@pytest.mark.parametrize("way", WAYS)
def test_a_link_to_another_file_is_none_of_the_bundle(tmp_path, secret, way):
    path = saved(tmp_path / "graphs", way(external("weights.bin")))
    (path.parent / "weights.bin").symlink_to(secret)
    with pytest.raises(SessionError, match=r"'weights\.bin', which is a link .*cp -rL"):
        open_session(path, "cpu", files=["weights.bin"])


def test_a_link_to_a_folder_leads_nowhere_else(tmp_path, secret):
    path = saved(tmp_path / "graphs", as_initializer(external("there/site.key")))
    (path.parent / "there").symlink_to(secret.parent)
    with pytest.raises(SessionError, match=r"from the file 'there/site\.key'"):
        open_session(path, "cpu", files=["weights.bin", "there/site.key"])


@pytest.mark.parametrize("location", ["*/_ORT_MEM_ADDR_/*", "", ".", "..", "weights.bin/../../home/site.key"])
def test_a_location_that_is_no_name_is_refused(tmp_path, location):
    path = saved(tmp_path / "graphs", as_initializer(external(location)))
    (path.parent / "weights.bin").write_bytes(SECRET)
    with pytest.raises(SessionError, match="tensor 'stolen' wants its data"):
        open_session(path, "cpu", files=["weights.bin"])


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": 1}, f"ends at byte {len(SECRET) + 1} of 'weights.bin', which has {len(SECRET)}"),
        ({"offset": 2**62}, "ends at byte"),
        ({"offset": 0, "length": len(SECRET) + 1}, "ends at byte"),
        ({"offset": -1}, "are no sizes"),
        ({"offset": "0x10"}, "are no sizes"),
        ({"length": "٣"}, "are no sizes"),
        ({"offset": "1" * 30}, "are no sizes"),
    ],
)
def test_a_tensor_lies_within_its_file(tmp_path, entries, reason):
    path = saved(tmp_path / "graphs", as_initializer(external("weights.bin", **entries)))
    (path.parent / "weights.bin").write_bytes(SECRET)
    with pytest.raises(SessionError, match=reason):
        open_session(path, "cpu", files=["weights.bin"])


def test_a_tensor_in_the_bundles_own_file_is_read(tmp_path):
    path = saved(tmp_path / "graphs", as_initializer(external("weights.bin", offset=0, length=len(SECRET))))
    (path.parent / "weights.bin").write_bytes(SECRET)
    session = open_session(path, "cpu", files=["weights.bin"])
    assert session.run(None, {})[0].tobytes() == SECRET


def test_a_place_that_is_named_twice_is_refused(tmp_path, secret):
    tensor = external("weights.bin")
    tensor.external_data.add(key="location", value=str(secret))
    path = saved(tmp_path / "graphs", as_initializer(tensor))
    with pytest.raises(SessionError, match="names the place of its data twice"):
        open_session(path, "cpu", files=["weights.bin"])


def field(number, content, high=0):
    """A length-delimited field, its key with bits beyond 32 where wanted, which a parser may drop."""
    return varint(number << 3 | 2 | high << 32) + varint(len(content)) + content


def raw_model(tmp_path, tensor_content, extra=b"", high=0):
    """A model with one initializer of these bytes, and what else its graph is to hold."""
    graph = model([]).graph.SerializeToString() + field(5, tensor_content, high) + extra
    made = model([])
    made.ClearField("graph")
    path = tmp_path / "graph.onnx"
    path.write_bytes(made.SerializeToString() + field(7, graph))
    return path


def opened_by_onnx_runtime(path):
    """What a session of the model gives, unchecked; None if ONNX Runtime does not open it."""
    onnxruntime = import_onnxruntime()
    try:
        return (
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            .run(None, {})[0]
            .tobytes()
        )
    except Exception:
        return None


@pytest.mark.parametrize("part", ["external_data", "data_location", "initializer", "value", "enumeration"])
@pytest.mark.parametrize("high", [1, 7])
def test_bits_that_a_parser_drops_hide_nothing(tmp_path, part, high):
    """ONNX Runtime keeps 32 bits of a key and of an enumeration: with more, another field seems to be meant."""
    (tmp_path / "beside.bin").write_bytes(SECRET)
    hidden = {
        name: high if part == name else 0
        for name in ("external_data", "data_location", "initializer", "value")
    }
    entry = field(1, b"location") + field(2, b"beside.bin", hidden["value"])
    location = 1 | (high << 32 if part == "enumeration" else 0)
    content = TensorProto(name="stolen", data_type=TensorProto.UINT8, dims=SHAPE).SerializeToString()
    content += field(13, entry, hidden["external_data"])
    content += varint(14 << 3 | hidden["data_location"] << 32) + varint(location)
    path = raw_model(tmp_path, content, high=hidden["initializer"])
    assert opened_by_onnx_runtime(path) in (None, SECRET)
    with pytest.raises(OnnxFileError):
        check_external_data(path)


def test_the_tests_own_writer_makes_what_onnx_runtime_reads(tmp_path):
    (tmp_path / "beside.bin").write_bytes(SECRET)
    path = raw_model(tmp_path, external("beside.bin").SerializeToString())
    assert opened_by_onnx_runtime(path) == SECRET
    check_external_data(path, ["beside.bin"])
    with pytest.raises(OnnxFileError, match="tensor 'stolen' wants its data"):
        check_external_data(path)


def test_fields_that_a_parser_would_join_are_refused(tmp_path, secret):
    first, second = external(secret), TensorProto(data_location=TensorProto.EXTERNAL)
    first.ClearField("data_location")
    attribute = helper.make_attribute("value", first).SerializeToString() + field(
        5, second.SerializeToString()
    )
    whole = onnx.AttributeProto()
    whole.ParseFromString(attribute)
    assert whole.t.data_location == TensorProto.EXTERNAL
    assert whole.t.external_data[0].value == str(secret)
    node = helper.make_node("Constant", [], ["stolen"]).SerializeToString() + field(5, attribute)
    graph = model([]).graph.SerializeToString() + field(1, node)
    made = model([])
    made.ClearField("graph")
    path = tmp_path / "graph.onnx"
    path.write_bytes(made.SerializeToString() + field(7, graph))
    with pytest.raises(OnnxFileError, match="written twice"):
        check_external_data(path)


def test_a_shape_of_giants_is_refused_in_words(tmp_path):
    (tmp_path / "weights.bin").write_bytes(SECRET)
    for dims in ([2**62 + 1] * 60, [2**62 + 1] * 300):
        tensor = external("weights.bin")
        tensor.ClearField("dims")
        tensor.dims.extend(dims)
        with pytest.raises(OnnxFileError):
            check_external_data(saved(tmp_path, as_initializer(tensor)), ["weights.bin"])


@pytest.mark.parametrize("place", ["model", "tensor"])
def test_a_file_of_countless_fields_is_refused_soon(tmp_path, place):
    countless = b"\x58\x01" * 3_000_000  # field 11, a number
    path = tmp_path / "graph.onnx"
    path.write_bytes(countless)
    if place == "tensor":
        path = raw_model(tmp_path, countless)
    with pytest.raises(OnnxFileError, match="more than 1000000 fields"):
        check_external_data(path)


def varint(value):
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])


def test_another_suffix_opens_no_other_format(tmp_path, secret):
    path = saved(tmp_path / "graphs", as_initializer(external("weights.bin")), name="graph.ort")
    (path.parent / "weights.bin").write_bytes(SECRET)
    assert open_session(path, "cpu", files=["weights.bin"]).run(None, {})[0].tobytes() == SECRET


@pytest.mark.parametrize("graph", ["image_encoder", "train_step", "text_features", "head"])
def test_a_hostile_bundle_is_refused_whichever_graph_it_hides_in(bundle, secret, graph):
    hostile(bundle, external(secret), graph)
    with pytest.raises(
        OnnxFileError, match=rf"{graph}\.onnx: tensor 'stolen' wants its data from .*site\.key"
    ):
        verify_bundle(bundle, load_manifest(bundle))


def test_no_engine_opens_a_hostile_graph(bundle, secret):
    hostile(bundle, external(secret), "head")
    with pytest.raises(SessionError, match="'stolen'"):
        open_engine(bundle, "onnx", "cpu")


def test_doctor_names_the_tensor_and_the_file(bundle, secret, capsys):
    hostile(bundle, external(secret))
    assert main(["doctor", "--bundle", str(bundle), "--json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["bundle"]["status"] == "failed"
    assert "'stolen'" in checks["bundle"]["text"]
    assert "site.key" in checks["bundle"]["text"]
    assert "device" not in checks


def test_a_client_does_not_join_with_a_hostile_bundle(bundle, secret, tmp_path, capsys):
    hostile(bundle, external(secret))
    options = ["--bundle", str(bundle), "--cache", str(tmp_path), "--federation", "birds", "--name", "north"]
    assert main(["client", *options, "--broker", "mqtt://127.0.0.1:1"]) == 1
    assert "tensor 'stolen' wants its data" in capsys.readouterr().err


def test_no_tagger_is_made_of_a_hostile_bundle(bundle, secret, tmp_path, capsys):
    hostile(bundle, external(secret), "image_encoder")
    out = tmp_path / "tagger.onnx"
    state = bundle / "state.safetensors"
    assert main(["export", "--bundle", str(bundle), "--state", str(state), "--out", str(out)]) == 1
    assert "tensor 'stolen' wants its data" in capsys.readouterr().err
    assert not out.exists()


def test_a_tagger_reads_no_other_file_not_even_beside_it(tmp_path, secret):
    path = saved(tmp_path / "taggers", as_initializer(external("photo.jpg")), name="tagger.onnx")
    (path.parent / "photo.jpg").write_bytes(SECRET)
    with pytest.raises(SessionError, match=r"'photo\.jpg', but no other file may be read"):
        Tagger.load(path, "cpu")


def test_a_graph_of_another_suffix_is_none_of_a_bundle(bundle):
    value = json.loads((bundle / "manifest.json").read_text())
    value["graphs"]["head"]["file"] = "head.ort"
    value["files"]["head.ort"] = value["files"]["head.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(Exception, match=r"the graph head\.ort is no \.onnx file"):
        load_manifest(bundle)


def test_a_graph_without_a_digest_is_none_of_the_bundle(bundle):
    value = json.loads((bundle / "manifest.json").read_text())
    del value["files"]["head.onnx"]
    (bundle / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(Exception, match=r"head\.onnx has no digest in it"):
        load_manifest(bundle)
