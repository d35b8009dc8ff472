"""Graphs of the UNet's step: recorded by a stand-in on the CPU, and by CUDA where there is one."""

import copy
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ldm2
from benchmarks import checkpoints
from ldm2 import ops
from ldm2.checkpoints import random_models
from ldm2.conditioning import Conditioning
from ldm2.config import UNetConfig, VAEConfig
from ldm2.runtime import graphs
from ldm2.runtime.compilation import compile_step
from ldm2.runtime.deepcache import reusing
from ldm2.runtime.graphs import GraphedUNet, Graphs, accelerated, pad_to_bucket, tensors
from ldm2.unet import UNet
from ldm2.vae import VAE
from tests.helpers import UNETS, Tape, condition, draw, our_unet

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module", params=["base", "48 kHz"])
def unet(request):
    return our_unet(checkpoints.unet(**UNETS[request.param]))


@pytest.fixture
def tape():
    return Tape()


def prepared(unet, rows=2, seed=1):
    return unet.prepare(condition(unet.config, rows, seed))


def step(unet, model, x_t, t, conditioning):
    """One call as the sampler makes it."""
    return model(x_t, t, conditioning, time=unet.embed_time(t))


@torch.no_grad()
def test_graphs_answer_as_the_unet_does(unet, tape):
    graphed, conditioning = GraphedUNet(unet, Graphs(tape)), prepared(unet)
    for i in range(5):
        x_t, t = draw(1, 4, 12, 8, seed=i), 900 - 100 * i
        expected = step(unet, unet, x_t, t, conditioning)
        torch.testing.assert_close(step(unet, graphed, x_t, t, conditioning), expected, atol=2e-5, rtol=0)
    assert tape.recorded == 1


@torch.no_grad()
def test_results_stay_what_they_are_when_the_graph_runs_again(unet, tape):
    graphed, conditioning = GraphedUNet(unet, Graphs(tape)), prepared(unet)
    results = [step(unet, graphed, draw(1, 4, 12, 8, seed=i), 500, conditioning) for i in range(5)]
    for i, result in enumerate(results):
        expected = step(unet, unet, draw(1, 4, 12, 8, seed=i), 500, conditioning)
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_runs_with_other_prompts_take_turns_on_one_graph(unet, tape):
    shared, x_t = Graphs(tape), draw(1, 4, 12, 8)
    runs = [(GraphedUNet(unet, shared), prepared(unet, seed=seed)) for seed in (1, 2)]
    for _ in range(4):
        for graphed, conditioning in runs:
            expected = step(unet, unet, x_t, 500, conditioning)
            torch.testing.assert_close(step(unet, graphed, x_t, 500, conditioning), expected, atol=2e-5, rtol=0)
    assert tape.recorded == 1


@torch.no_grad()
def test_each_shape_has_its_graph_and_the_oldest_makes_room(unet, tape, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    graphed, conditioning = GraphedUNet(unet, Graphs(tape)), prepared(unet)
    for frames, recorded in [(8, 1), (12, 2), (8, 2), (16, 3), (8, 3), (12, 4)]:
        for _ in range(3):
            assert step(unet, graphed, draw(1, 4, frames, 8), 500, conditioning).shape == (2, 4, frames, 8)
        assert tape.recorded == recorded


@torch.no_grad()
def test_a_compiled_unet_is_recorded_at_its_first_call(unet, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    made, compiled = [], copy.copy(unet)
    compile_step(compiled)
    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: Tape())
    for model, calls in ((compiled, 1), (unet, graphs.WARM_UP + 1)):
        graphed = GraphedUNet(model, graphs.graphs_of(model, cuda))
        for call in range(1, calls + 1):
            step(unet, graphed, draw(1, 4, 8, 8), 500, prepared(unet))
            made.append((call, graphed.graphs.capture.recorded))
    assert made == [(1, 1), *((call, 0) for call in range(1, calls)), (calls, 1)]


@torch.no_grad()
def test_reused_features_go_through_graphs(unet, tape):
    graphed, conditioning = GraphedUNet(unet, Graphs(tape)), prepared(unet)
    ours, plain = reusing(graphed, 2), reusing(unet, 2)
    for i in range(8):
        x_t, time = draw(1, 4, 12, 8, seed=i), unet.embed_time(900 - 100 * i)
        expected = plain(x_t, 900 - 100 * i, conditioning, time)
        torch.testing.assert_close(ours(x_t, 900 - 100 * i, conditioning, time), expected, atol=2e-5, rtol=0)
    assert tape.recorded == 2


def test_calls_that_need_gradients_or_the_reference_are_not_recorded(unet, tape):
    graphed, conditioning = GraphedUNet(unet, Graphs(tape)), prepared(unet)
    for _ in range(4):
        assert step(unet, graphed, draw(1, 4, 8, 8), 500, conditioning).requires_grad
        with torch.no_grad(), ops.backend("reference"):
            step(unet, graphed, draw(1, 4, 8, 8), 500, conditioning)
    assert tape.recorded == 0


def test_graphs_recorded_in_inference_mode_serve_outside_of_it(unet, tape):
    graphed = GraphedUNet(unet, Graphs(tape))
    with torch.inference_mode():
        conditioning = prepared(unet)
        for _ in range(3):
            step(unet, graphed, draw(1, 4, 8, 8), 500, conditioning)
    with torch.no_grad():
        step(unet, graphed, draw(1, 4, 8, 8), 500, prepared(unet))
    assert tape.recorded == 1


@torch.no_grad()
def test_lengthened_contexts_do_not_change_the_prediction():
    unet = our_unet(checkpoints.unet())
    conditioning = condition(unet.config, 2)
    conditioning.masks[1][1] = 0                           # a row that keeps nothing attends to all it has
    plain, long = unet.prepare(conditioning), pad_to_bucket(unet.prepare(conditioning))
    assert {kv.keys.shape[2] for layers in plain.key_values for kv in layers if kv is not None} == {8, 5}
    assert {kv.keys.shape[2] for layers in long.key_values for kv in layers if kv is not None} == {8}
    x_t = draw(1, 4, 8, 8)
    torch.testing.assert_close(unet(x_t, 500, long), unet(x_t, 500, plain), atol=5e-5, rtol=0)


def assert_fused_on_cuda(q, k, v, bias):
    """What the memory-efficient kernel of PyTorch asks for on CUDA, so that no call is left to plain products.

    FlashAttention, which comes first, takes neither a bias nor more than 256 channels a head. A bias of other strides
    would be copied in every call.
    """
    assert [tensor.dim() for tensor in (q, k, v)] == [4, 4, 4]
    assert q.shape[:2] == k.shape[:2] and k.shape == v.shape
    assert q.shape[3] == k.shape[3] and q.shape[3] % 8 == 0
    for tensor in (q, k, v):
        assert tensor.stride(3) == 1 and tensor.stride(2) % 8 == 0 and tensor.storage_offset() % 8 == 0
    if bias is not None:
        assert bias.dtype == q.dtype and bias.shape == (len(q), 1, 1, k.shape[2])
        assert bias.stride(3) == 1 and not any(stride % 8 for stride in bias.stride()[:3])


@torch.no_grad()
@pytest.mark.parametrize("reference", ["authors", "diffusers"])
def test_attention_of_published_sizes_is_fused_on_cuda(reference, monkeypatch):
    calls, attention = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(args) or attention(*args))
    fields = random_models.fields("audioldm2")
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(fields["unet"], reference=reference)).half()
        contexts = [torch.empty(2, tokens, width).half() for tokens, width in ((8, 768), (85, 1024))]
        conditioning = pad_to_bucket(unet.prepare(Conditioning(tuple(contexts), (None, None))))
        unet(torch.empty(1, 8, 250, 16).half(), 5.0, conditioning)
        VAE(VAEConfig.from_dict(fields["vae"])).half().decode(torch.empty(1, 8, 250, 16).half())
    for args in calls:
        assert_fused_on_cuda(*args, *[None] * (4 - len(args)))
    assert {None, 88} == {None if bias is None else bias.shape[3] for *_, bias in calls[:-1]}


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 8, 11])
def test_a_bias_is_aligned_for_cuda_however_long_the_prompt(tokens):
    unet = our_unet(checkpoints.unet())
    short = condition(unet.config, 2)
    mask = torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2]])
    contexts = short.contexts[0], draw(2, tokens, unet.config.context_widths[1])
    conditioning = unet.prepare(replace(short, contexts=contexts, masks=(None, mask)))
    key_values = [kv for layers in pad_to_bucket(conditioning).key_values for kv in layers if kv is not None]
    biases = [kv.bias for kv in key_values if kv.bias is not None]
    assert biases and all(bias.stride()[:3] == (bias.shape[3],) * 3 and bias.shape[3] % 8 == 0 for bias in biases)


@torch.no_grad()
def test_layers_that_share_a_bias_share_it_when_lengthened(unet):
    biases = {id(kv.bias) for layers in pad_to_bucket(prepared(unet)).key_values for kv in layers if kv}
    assert len(biases - {id(None)}) <= 1


@torch.no_grad()
def test_the_tensors_of_a_conditioning_are_listed_once(unet):
    every = list(tensors(prepared(unet)))
    assert len(every) == len({id(tensor) for tensor in every})


def test_on_the_cpu_the_unet_is_its_own_acceleration(unet):
    assert accelerated(unet) is unet


@pytest.mark.cuda
@on_cuda
@torch.no_grad()
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-3), (torch.float16, 2e-2)])
def test_a_cuda_graph_answers_as_the_unet_does(dtype, atol):
    unet = our_unet(checkpoints.unet()).to("cuda", dtype)
    conditioning = unet.prepare(condition(unet.config, 2).to("cuda", dtype))
    graphed = accelerated(unet)
    for frames in (8, 12, 8):
        for i in range(5):
            x_t, t = draw(1, 4, frames, 8, seed=i).to("cuda", dtype), 900 - 100 * i
            expected = step(unet, unet, x_t, t, conditioning)
            torch.testing.assert_close(step(unet, graphed, x_t, t, conditioning), expected, atol=atol, rtol=0)
    assert len(graphed.graphs._graphs) == 2


def test_a_unet_that_moves_leaves_no_graphs(unet, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: Tape())
    moved, device = copy.deepcopy(unet), torch.device("cpu")
    kept = weakref.ref(graphs.graphs_of(moved, device))
    assert graphs.graphs_of(moved, device) is kept()
    moved.to(torch.bfloat16)                               # the parameters are the same objects
    compile_step(moved)
    assert graphs.graphs_of(moved, device).addresses != () and kept() is None
    graphs.forget(moved)
    graphs.forget(moved)
    assert next(moved.parameters()) not in graphs._graphs


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """PyTorch's own `torch.cuda.graph` does not, where the end of the recording fails."""
    class Graph:
        def __init__(self, graph, stream, **_):
            self.stream = stream

        def __enter__(self):
            current[0] = self.stream

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            pass

    @contextmanager
    def stream(wanted):
        before, current[0] = current[0], wanted
        try:
            yield
        finally:
            current[0] = before

    default = Stream()
    current = [default]
    fakes = {"device": lambda device: nullcontext(), "current_stream": lambda: current[0], "stream": stream,
             "Stream": lambda device: Stream(), "CUDAGraph": SimpleNamespace, "graph": Graph,
             "graph_pool_handle": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.CudaCapture(torch.device("cuda"))(lambda: ())
    assert current[0] is default


@torch.no_grad()
def test_a_call_from_tensor_to_tensor_is_recorded(tape, monkeypatch):
    vae = VAE(VAEConfig(1, 1, 4, (8, 16), 1, 4, 1.0))
    assert graphs.replayed(vae, vae.decode) == vae.decode  # on a CPU
    monkeypatch.setattr(graphs, "_records", lambda device: True)
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: tape)
    run = graphs.replayed(vae, vae.decode)
    kept = [run(draw(1, 4, 6, 4, seed=i)) for i in range(5)]
    for i, mel in enumerate(kept):
        torch.testing.assert_close(mel, vae.decode(draw(1, 4, 6, 4, seed=i)), atol=1e-5, rtol=0)
    assert tape.recorded == 1
    with torch.enable_grad():
        assert graphs.replayed(vae, vae.decode)(draw(1, 4, 6, 4)).requires_grad
    with ops.backend("reference"):
        run(draw(1, 4, 5, 4))
    assert tape.recorded == 1


@pytest.mark.cuda
@on_cuda
def test_graphs_on_cuda_are_gone_with_the_weights_they_read():
    unet = our_unet(checkpoints.unet()).to("cuda")
    assert accelerated(unet).graphs is accelerated(unet).graphs
    before = len(graphs._graphs)
    unet.to("meta")
    assert len(graphs._graphs) == before - 1


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m"])
def test_generation_on_cuda_is_near_that_of_plain_pytorch(tiny_checkpoint, sampler):
    pipe = ldm2.load(tiny_checkpoint, device="cuda", dtype="float32")
    settings = {"seconds": 0.64, "steps": 8, "seed": 1, "sampler": sampler}
    with ops.backend("reference"):
        expected = pipe.generate("rain", **settings).waveforms
    for _ in range(4):                                     # the VAE and the vocoder are recorded in the third
        got = pipe.generate("rain", **settings).waveforms
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), atol=2e-3, rtol=0)
