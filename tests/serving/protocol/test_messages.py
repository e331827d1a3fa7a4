"""The messages are those of the protocol, and what is too much to read is refused before it is read."""

from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from serving.protocol import messages
from serving.protocol.messages import Malformed, check_infer_request, message


def test_every_field_has_the_number_and_the_type_that_tritonclient_gives_it() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    theirs = service_pb2.DESCRIPTOR.pool
    checked = 0
    for descriptor in messages.pool().FindFileByName("inference.proto").message_types_by_name.values():
        for kind in (descriptor, *descriptor.nested_types):
            their_fields = theirs.FindMessageTypeByName(kind.full_name).fields_by_name
            for field in kind.fields:
                other = their_fields[field.name]
                assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
                holders = [f.message_type.full_name if f.message_type else "" for f in (field, other)]
                assert holders[0] == holders[1], field.full_name
                checked += 1
    assert checked > 100
    ours = messages.pool().FindFileByName("inference.proto").enum_types_by_name["DataType"]
    numbers = theirs.FindEnumTypeByName("inference.DataType").values_by_name
    assert {value.name: value.number for value in ours.values} == {
        value.name: numbers[value.name].number for value in ours.values
    }


def test_every_method_takes_and_returns_what_it_does_in_tritonclient() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    ours = messages.pool().FindFileByName("inference.proto").services_by_name["GRPCInferenceService"].methods
    assert len(ours) == 12
    for method in ours:
        other = theirs[method.name]
        assert method.input_type.full_name == other.input_type.full_name
        assert method.output_type.full_name == other.output_type.full_name


def test_the_compiled_messages_are_what_the_compiler_makes_of_the_source(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    source = messages.COMPILED.with_name("inference.proto")
    made = tmp_path / "made.binpb"
    assert protoc.main(["protoc", f"-I{source.parent}", f"--descriptor_set_out={made}", source.name]) == 0
    committed = messages.COMPILED.read_bytes()
    assert FileDescriptorSet.FromString(made.read_bytes()) == FileDescriptorSet.FromString(committed)


@pytest.mark.parametrize(
    "body",
    [
        b"\x32\x00" * 20_000,  # outputs
        b"\x3a\x00" * 20_000,  # raw_input_contents
        b"\x22\x00" * 20_000,  # parameters
        b"\x78\x00" * 20_000,  # a field that there is not
        b"\x2a\xc0\xb8\x02" + b"\x22\x00" * 20_000,  # an input's parameters
        b"\x32\xc0\xb8\x02" + b"\x12\x00" * 20_000,  # an output's parameters
        b"\x2a\xc4\xb8\x02\x2a\xc0\xb8\x02" + b"\x42\x00" * 20_000,  # bytes_contents
    ],
)
def test_a_request_of_very_many_parts_is_refused_before_it_is_read(body) -> None:
    assert message("ModelInferRequest").FromString(body).ByteSize() > 0  # it could be read
    with pytest.raises(Malformed, match="too many parts"):
        check_infer_request(body, 10_000)


def test_a_shape_of_very_many_dimensions_is_refused_before_it_is_read() -> None:
    request = message("ModelInferRequest")()
    request.inputs.add(name="images", shape=[1] * 5000)
    with pytest.raises(Malformed, match="too many dimensions"):
        check_infer_request(request.SerializeToString(), 10_000)
