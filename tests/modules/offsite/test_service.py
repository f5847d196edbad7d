"""The owner's service over TLS: the numbers of the layers at hand, and what is refused."""

import json
import threading
import time

import grpc
import pytest
import torch

from fulgurite.errors import InputError
from fulgurite.modules.offsite import ModelPart, Prefix, PrefixSettings
from fulgurite.modules.offsite.certificates import make_certificates
from fulgurite.modules.offsite.client import OwnerClient, OwnerLost
from fulgurite.modules.offsite.frames import Frame, FrameError
from fulgurite.modules.offsite.owner import OwnerLayers, UnknownStep
from fulgurite.modules.offsite.protocol import SERVICE, with_prefix
from fulgurite.modules.offsite.server import OwnerServer

from ..span_attention.small import SIZES, model_of

CUT, LENGTH, HIDDEN = 1, 3, SIZES["hidden_size"]


def layers():
    model = model_of("llama")
    return OwnerLayers(ModelPart(model, CUT, len(model.model.layers)))


def prefix_for(kind="prompts"):
    own = Prefix.random(model_of("llama"), PrefixSettings(kind, LENGTH)).within(CUT, 99)
    return Prefix(own.settings, [rows.detach() for rows in own.rows])


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("papers")
    make_certificates(folder, hosts=["localhost"], parties=["one", "two"])
    return folder


def serving(papers, **settings):
    tokens = {name: (papers / f"{name}.token").read_text().strip() for name in ("one", "two")}
    return OwnerServer(
        layers(), model="whole", tokens=tokens, certificate=papers / "owner.crt", key=papers / "owner.key", **settings
    ).start()


@pytest.fixture(scope="module")
def server(papers):
    found = serving(papers, most_message_bytes=1 << 16)
    yield found
    found.stop(0)


def client(papers, server, party="one", **settings):
    token = (papers / f"{party}.token").read_text().strip()
    given = {"token": token, "certificate": papers / "owner.crt", "patience": 0.3, **settings}
    return OwnerClient(f"localhost:{server.port}", **given)


@pytest.mark.parametrize("kind", ["prompts", "key_values"])
def test_what_comes_over_the_network_is_what_the_layers_compute(papers, server, kind):
    states, own, remote = torch.randn(2, 5, HIDDEN), layers(), client(papers, server)
    own.begin("one", 0, LENGTH, prefix_for(kind))
    remote.begin(0, LENGTH, prefix_for(kind))
    here, there = own.forward("one", 0, 0, states), remote.forward(0, 0, states)
    assert torch.equal(here, there)
    assert torch.equal(own.backward("one", 0, 0, here), remote.backward(0, 0, there))
    for one, other in zip(own.collect("one", 0), remote.collect(0), strict=True):
        assert torch.equal(one, other)
    text = states.nbytes
    assert remote.sent_bytes < 2 * text + len(prefix_for(kind).rows) * prefix_for(kind).rows[0].nbytes + 2500
    assert remote.health()["cut"] == CUT


def test_parties_do_not_see_each_others_steps(papers, server):
    one, two = client(papers, server), client(papers, server, "two")
    one.begin(3, LENGTH, prefix_for())
    with pytest.raises(UnknownStep, match="step=3 was not begun, or is forgotten"):
        two.forward(3, 0, torch.randn(1, 2, HIDDEN))


def test_who_is_not_known_is_refused(papers, server, tmp_path):
    with pytest.raises(InputError, match=r"refuses health \(unauthenticated\): The token is of no party"):
        client(papers, server, token="x" * 43).health()
    with pytest.raises(InputError, match=r"refuses health \(unauthenticated\)"):
        client(papers, server, token="").health()
    make_certificates(tmp_path, hosts=["localhost"], parties=["one"])
    with pytest.raises(InputError, match="is not trusted .*Give the certificate that the owner gave you"):
        client(papers, server, certificate=tmp_path / "owner.crt", patience=60).health()
    with pytest.raises(OwnerLost, match="did not answer health for 0.3 seconds .* Is it running there"):
        OwnerClient("localhost:1", token="x", certificate=papers / "owner.crt", patience=0.3).health()
    plain = grpc.insecure_channel(f"localhost:{server.port}").unary_unary(f"/{SERVICE}/health")
    with pytest.raises(grpc.RpcError) as caught:
        plain(Frame("health").encode(), timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert client(papers, server).health()["layers"] == len(model_of("llama").model.layers)


def silent_calls(papers, server, number, token):
    """Calls whose message never comes."""
    credentials = grpc.ssl_channel_credentials((papers / "owner.crt").read_bytes())
    channel = grpc.secure_channel(f"localhost:{server.port}", credentials)
    never = threading.Event()

    def messages():
        never.wait()
        yield b""

    call = channel.stream_unary(f"/{SERVICE}/health")
    return [call.future(messages(), metadata=(("authorization", f"Bearer {token}"),)) for _ in range(number)], never


def test_calls_that_never_send_hold_up_nobody(papers):
    found = serving(papers, most_calls=6, most_wait=1.5)
    strangers, stop_strangers = silent_calls(papers, found, 5, "x" * 43)
    assert all(call.exception(timeout=10).code() == grpc.StatusCode.UNAUTHENTICATED for call in strangers)
    hung, stop_hung = silent_calls(papers, found, 3, (papers / "two.token").read_text().strip())
    while found._at_work["two"]._value:
        time.sleep(0.01)
    assert client(papers, found).health()["cut"] == CUT
    with pytest.raises(OwnerLost, match="3 calls of this party are at work"):
        client(papers, found, "two").health()
    assert client(papers, found, "two", patience=20).health()["cut"] == CUT  # once the silent ones are given up
    assert all(call.exception(timeout=10) is not None for call in hung)
    for stop in (stop_strangers, stop_hung):
        stop.set()
    found.stop(0)


def test_calls_that_are_cancelled_count_until_they_are_computed(papers):
    found = serving(papers)
    token = (papers / "one.token").read_text().strip()
    credentials = grpc.ssl_channel_credentials((papers / "owner.crt").read_bytes())
    call = grpc.secure_channel(f"localhost:{found.port}", credentials).unary_unary(f"/{SERVICE}/begin")
    message = with_prefix("begin", {"step": 1}, LENGTH, prefix_for()).encode()
    with found.layers.turns.of("another"):
        for number in (1, 2, 3):
            sent = call.future(message, metadata=(("authorization", f"Bearer {token}"),))
            while len(found.layers.turns._waiting) < number:
                time.sleep(0.01)
            sent.cancel()
        while any(one._value < 3 for one in found._unread.values()):
            time.sleep(0.01)
        with pytest.raises(OwnerLost, match="3 calls of this party are at work"):
            client(papers, found).health()
        assert client(papers, found, "two").health()["cut"] == CUT
    assert client(papers, found, patience=20).health()["cut"] == CUT
    found.stop(0)


def test_an_expired_certificate_is_refused(tmp_path):
    make_certificates(tmp_path, hosts=["localhost"], parties=["one", "two"], days=-1)
    expired = serving(tmp_path)
    with pytest.raises(InputError, match="is not trusted"):
        client(tmp_path, expired, patience=60).health()
    expired.stop(0)


def test_bad_messages_are_refused_by_name_and_the_owner_stays_up(papers, server):
    remote = client(papers, server)
    remote.begin(0, LENGTH, prefix_for())
    with pytest.raises(InputError, match=r"refuses forward \(resource_exhausted\)"):
        remote.forward(0, 0, torch.zeros(1, 2000, HIDDEN))
    with pytest.raises(FrameError, match=r"forward: states holds numbers that are not finite"):
        remote.forward(0, 0, torch.full((1, 2, HIDDEN), float("nan")))
    with pytest.raises(FrameError, match=r"states has the shape \[1, 2, 5\]. Legal: \[any, any, 48\]"):
        remote.forward(0, 0, torch.zeros(1, 2, 5))
    with pytest.raises(FrameError, match="The owner refuses forward: A frame is damaged"):
        remote._ask("forward", b"anything")
    with pytest.raises(FrameError, match="A message of kind 'begin' is not expected here. Legal: forward"):
        remote._ask("forward", Frame("begin").encode())
    with pytest.raises(InputError, match=r"refuses steal \(unimplemented\)"):
        remote._ask("steal", b"")
    wrong = {"step": 1, "prefix": "prompts", "length": 3, "layers": [0]}
    for fields, tensors, message in [
        ({"prefix": "weights"}, {}, "prefix='weights' with layers=.0. needs just the tensor"),
        ({"layers": ["0"]}, {"prompts": torch.zeros(1, 3, HIDDEN)}, "needs just the tensor"),
        ({"layers": [7]}, {"prompts": torch.zeros(1, 3, HIDDEN)}, "prefix.layers=.7.: the model has 2"),
        ({"length": 9}, {"prompts": torch.zeros(1, 3, HIDDEN)}, "are no prompts of length 9"),
        ({"step": 1.5}, {"prompts": torch.zeros(1, 3, HIDDEN)}, "field step=1.5 is no int"),
    ]:
        with pytest.raises(FrameError, match=message):
            remote._ask("begin", Frame("begin", {**wrong, **fields}, tensors).encode())
    assert remote.forward(0, 0, torch.zeros(1, 2, HIDDEN)).shape == (1, 2, HIDDEN)


def test_a_call_waits_for_an_owner_that_comes_back(papers):
    first = serving(papers)
    remote = client(papers, first, patience=30)
    remote.begin(0, LENGTH, prefix_for())
    states = torch.randn(1, 4, HIDDEN)
    expected = remote.forward(0, 0, states)
    first.stop(0)
    again = serving(papers, address=f"localhost:{first.port}")
    with pytest.raises(UnknownStep):  # it has forgotten the step; the party sends it again
        remote.forward(0, 0, states)
    remote.begin(0, LENGTH, prefix_for())
    assert torch.equal(remote.forward(0, 0, states), expected)
    again.stop(0)


def test_parties_are_added_to_those_that_are_there(tmp_path):
    make_certificates(tmp_path, hosts=["localhost"], parties=["one"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_certificates(tmp_path, hosts=[], parties=["two"])
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    assert list(tokens) == ["one", "two"]
    assert tokens["two"] == (tmp_path / "two.token").read_text().strip()
    assert tokens["one"] == json.loads(before["tokens.json"])["one"]
    for name in ("owner.crt", "owner.key", "one.token"):
        assert (tmp_path / name).read_bytes() == before[name]
    with pytest.raises(InputError, match="two.token already"):
        make_certificates(tmp_path, hosts=[], parties=["two"])


def test_settings_that_cannot_be_are_refused(papers, server, tmp_path):
    given = {"model": "whole", "certificate": papers / "owner.crt", "key": papers / "owner.key"}
    with pytest.raises(InputError, match="each party needs one of its own"):
        OwnerServer(layers(), tokens={"one": "x" * 16, "two": "x" * 16}, **given)
    with pytest.raises(InputError, match=r"most_wait=-1\.0: legal is above 0"):
        OwnerServer(layers(), tokens={"one": "x" * 16}, most_wait=-1.0, **given)
    with pytest.raises(InputError, match="there are 9 parties, but the layers take most_sessions=8 at once"):
        OwnerServer(layers(), tokens={str(number): f"{number}" * 16 for number in range(9)}, **given)
    with pytest.raises(InputError, match="each party needs one of its own, of at least 16 characters"):
        OwnerServer(layers(), model="whole", tokens={"one": "short"}, certificate=papers / "owner.crt", key=papers / "owner.key")
    with pytest.raises(InputError, match="No such file"):
        OwnerServer(
            layers(), model="whole", tokens={"one": "x" * 16}, certificate=tmp_path / "none.crt", key=papers / "owner.key"
        )
    make_certificates(tmp_path / "other", hosts=["localhost"], parties=["one"])
    with pytest.raises(InputError, match="are no PEM files of a certificate and its key"):
        OwnerServer(
            layers(),
            model="whole",
            tokens={"one": "x" * 16},
            certificate=papers / "owner.crt",
            key=tmp_path / "other" / "owner.key",
        )
    with pytest.raises(InputError, match="cannot be listened at: the port is taken"):
        serving(papers, address=f"localhost:{server.port}")
    with pytest.raises(InputError, match="address='7421': legal is host:port"):
        serving(papers, address="7421")
    with pytest.raises(InputError, match="address='localhost': legal is host:port"):
        OwnerClient("localhost", token="x", certificate=papers / "owner.crt")
    with pytest.raises(InputError, match="cannot be read"):
        client(papers, server, certificate=tmp_path / "none.crt")
    with pytest.raises(InputError, match="has owner.crt, owner.key, tokens.json, one.token already"):
        make_certificates(papers, hosts=["localhost"], parties=["one"])
    with pytest.raises(InputError, match=r"parties=\[\]: give one or more"):
        make_certificates(tmp_path, hosts=["localhost"], parties=[])
    with pytest.raises(InputError, match=r"hosts=\[\]: a new certificate needs a name"):
        make_certificates(tmp_path, hosts=[], parties=["one"])
    (tmp_path / "no.crt").write_text("no certificate")
    with pytest.raises(InputError, match="cannot be read as a PEM certificate"):
        client(papers, server, certificate=tmp_path / "no.crt")
    assert (papers / "owner.key").stat().st_mode & 0o077 == 0
