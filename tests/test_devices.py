"""No mix of devices, seen without a GPU: tensors without data that claim to be on cuda:0.

Torch's fake tensors know shape, type and device. An operation on two devices raises as it would on a GPU, and nothing
is ever computed; where a program asks for a value all the same, to choose what to do, it is told 0 or True.
"""

import contextlib
import copy
import ctypes
import shutil
import subprocess

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES, once_per_part
from pyro.infer import Trace_ELBO
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import cpp_extension

import dgm_pyro as dgm
from dgm_pyro import anomaly, classification, corruptions, evaluation, representations
from dgm_pyro.families.labeled import Labeled
from dgm_pyro.objectives import ELBO, RWS, Enumerate, FreeBits
from dgm_pyro.program import Program
from dgm_pyro.training import compilation
from dgm_pyro.training import fit as training

DEVICE = torch.device("cuda:0")
# A device of torch's own that has neither numbers nor a driver: operations and gradients on it need no stand-in.
LAZY = torch.device("lazy:0")

# Before each operation torch switches to the device of the tensors. Here there is nothing to switch to.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
static Guard guard;
static auto& in_use = impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
static const impl::DeviceGuardImplInterface* before = in_use.load();
extern "C" void enter() { in_use.store(&guard); }
extern "C" void leave() { in_use.store(before); }
"""


class Pretence(FakeTensorMode):
    """Within it tensors are fake; `there` takes what is outside along, to ``device``."""

    def __init__(self, device):
        super().__init__(allow_non_fake_inputs=True)
        self.device = device

    def dispatch(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0
        return super().dispatch(func, types, args, kwargs or {})

    def there(self, value, device=None):
        """A tensor, a tuple of them or None; or a module, in place, as ``module.to(device)`` would."""
        if isinstance(value, tuple):
            return tuple(map(self.there, value))
        if isinstance(value, nn.Module):
            for module in value.modules():  # each once: no parameter can be replaced a second time
                module._apply(self.there, recurse=False)
            return value
        if value is None:
            return None
        return FakeTensor(self, torch.empty(value.shape, dtype=value.dtype, device="meta"), device or self.device)


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, to stand in for the device's driver")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: test_gpu.py uses it")
    source = tmp_path_factory.mktemp("guard") / "guard.cpp"
    source.write_text(GUARD)
    paths = [f"-I{path}" for path in cpp_extension.include_paths()]
    for path in cpp_extension.library_paths():
        paths += [f"-L{path}", f"-Wl,-rpath,{path}"]
    library = source.with_suffix(".so")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *paths, str(source), "-lc10", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs a C++ compiler that knows torch's headers: {done.stderr[-300:]}")
    return ctypes.CDLL(str(library))


@pytest.fixture
def unchecked(monkeypatch):
    """The checks of data look at values, and those of distributions too."""
    for check in ("check", "check_given"):
        monkeypatch.setattr(Program, check, lambda *arguments, **options: None)


@pytest.fixture
def pretence(guard, unchecked):
    with contextlib.ExitStack() as stack:
        stack.callback(guard.leave)
        guard.enter()
        stack.enter_context(torch.no_grad())
        stack.enter_context(pyro.validation_enabled(False))
        yield stack.enter_context(Pretence(DEVICE))


@pytest.fixture
def elsewhere(unchecked):
    with pyro.validation_enabled(False), Pretence(LAZY) as pretence:
        yield pretence


def watched(monkeypatch):
    """A list that will hold the devices whose random state has been left as it was; no others may be seeded."""
    devices = []

    @contextlib.contextmanager
    def fork(devices_here):
        devices.extend(devices_here)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork(devices))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds the generators of every device"))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: devices.append(device) or torch.zeros(16))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: devices.append(device))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return devices


def built(name, pretence):
    """A program of the registry, x and given, on the device of ``pretence``."""
    with unset_fake_temporarily():
        case = CASES[name]
        program = case.build(dtype=torch.float32)
        x, given = case.draw(program, 6, dtype=torch.float32)
    return pretence.there(program), pretence.there(x), pretence.there(given)


@pytest.mark.parametrize("place", ["pretence", "elsewhere"])
def test_a_mix_is_seen(place, request):
    pretence = request.getfixturevalue(place)
    on_device = pretence.there(torch.zeros(3))
    assert (on_device + 1).device == pretence.device
    with pytest.raises(RuntimeError, match="same device"):
        on_device + torch.zeros(3)


def test_a_mix_is_seen_on_the_way_back(elsewhere):
    class Mixed(torch.autograd.Function):
        forward = staticmethod(lambda context, x: x + 0)
        backward = staticmethod(lambda context, gradient: gradient * torch.ones(3))

    with pytest.raises(RuntimeError, match="same device"):
        Mixed.apply(elsewhere.there(torch.zeros(3)).requires_grad_()).sum().backward()


@pytest.mark.parametrize("name", once_per_part(CASES))
def test_every_program_and_its_gradient_stay_there(name, elsewhere):
    program, x, given = built(name, elsewhere)
    if "diffusion" not in name:  # whose many steps are those of the next test
        with torch.no_grad():
            assert program.sample(6, given).device == LAZY
    if isinstance(program, dgm.Implicit):
        return
    with torch.no_grad():
        assert program.log_weights(x, given, num_particles=3).device == LAZY
        objectives = [] if program.tractable else [FreeBits(), RWS(3, sleep=0.5), Enumerate()]
        for objective in objectives:
            assert objective(program, x, given).surrogate.device == LAZY, objective
        if isinstance(program, Labeled):
            assert program.log_joint(x, 2).device == LAZY
    loss = -ELBO(2)(program, x, given).surrogate.mean()
    assert loss.device == LAZY
    if loss.requires_grad:  # a Normal without a parameter learns nothing
        loss.backward()
        gradients = [p.grad for p in program.parameters() if p.grad is not None]
        assert gradients
        assert all(gradient.device == LAZY for gradient in gradients)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun"])
@pytest.mark.parametrize("name", ["diffusion-levels", "continuous-diffusion-given-label"])
def test_every_sampler_stays_there(name, sampler, pretence):
    program, _, given = built(name, pretence)
    assert program.sample(6, given, sampler=sampler).device == DEVICE


TRAINED = [("vae", "elbo"), ("vae", "iwae:3"), ("vae", Trace_ELBO())]
TRAINED += [(name, "elbo") for name in ("diffusion-importance", "nsf", "labeled-vae")]


@pytest.mark.parametrize(
    ("name", "objective"), TRAINED, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_training_and_evaluation_stay_there(name, objective, pretence, monkeypatch):
    """All but the way back, which torch's engine does not go on a device that is not there."""
    program, x, given = built(name, pretence)
    data = dgm.Data(pretence.there(x, torch.device("cpu")), given)

    def backward(loss, *arguments, **options):
        assert loss.device == DEVICE
        for parameter in program.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)  # it is there
    for module in (training, evaluation):
        monkeypatch.setattr(module, "find_device", lambda device: DEVICE)
    # There is nothing that records, nor a memory whose size could be asked for.
    monkeypatch.setattr(training, "RECORDING_DEVICES", set())
    monkeypatch.setattr(evaluation, "most_at_once", lambda device: (evaluation.ROWS_AT_ONCE, evaluation.VALUES_AT_ONCE))
    forked = watched(monkeypatch)
    options = {"epochs": 2, "batch_size": 4, "validation": data, "ema": 0.9, "progress": False}
    with torch.enable_grad():
        dgm.fit(program, data, objective, **options)
    assert all(tensor.device == DEVICE for tensor in program.parameters())
    assert forked
    assert set(forked) == {DEVICE}
    for particles in (1, 3):
        assert dgm.evaluate(program, data, num_particles=particles).values.device.type == "cpu"


class Undeclared(dgm.VAE):
    def latents(self, name):
        return None


def test_the_random_state_that_is_left_as_it_was_is_that_of_the_device(pretence, monkeypatch):
    (program, x, _), (labeled, x_of_labeled, _) = (built(name, pretence) for name in ("vae", "labeled-vae"))
    forked = watched(monkeypatch)
    Undeclared(program.prior, program.likelihood, program.encoder).guide(x)
    assert forked == [DEVICE]
    compilation.PairTerms(program.model, program.guide, Trace_ELBO()).stated((x,), {})
    assert forked == [DEVICE] * 2
    labeled.log_joint(x_of_labeled)
    assert forked == [DEVICE] * (2 + labeled.num_labels)


@pytest.mark.parametrize("objective", ["annealed", FreeBits()], ids=str)
def test_schedules_are_there_for_cuda_graphs(objective, elsewhere):
    program, x, given = built("vae", elsewhere)
    terms = compilation.Terms(program, dgm.objectives.chosen(objective))
    weights = terms.weights(0.5)
    assert {weight.device for weight in weights.values()} <= {LAZY}
    assert terms(x, given, {}, weights)["loss"][""].device == LAZY


def test_a_flow_of_pyros_transforms_stays_there(pretence):
    with unset_fake_temporarily():
        permute = dist.transforms.Permute(torch.tensor([2, 0, 3, 1]))
        affine = dist.transforms.AffineTransform(torch.zeros(4), torch.ones(4), event_dim=1)
        flow = dgm.Flow(4, [permute, affine.inv, dist.transforms.affine_coupling(4)])
    assert pretence.there(flow).log_prob(pretence.there(torch.zeros(5, 4))).device == DEVICE


IMAGES = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
CORRUPTIONS = {
    "shuffle": lambda x: corruptions.shuffle_pixels(x),
    "noise": lambda x: corruptions.add_noise(x, 1.0, 17),
    "mutate": lambda x: corruptions.mutate(x, 0.1, 17),
    "shift": lambda x: corruptions.shift(x, 1, -1),
    "rotate": lambda x: corruptions.rotate(x, 10.0, 17),
    "blur": lambda x: corruptions.blur(x, 1.0, 17),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupted_images_stay_there(corrupt, pretence):
    x = corrupt(pretence.there(IMAGES))
    assert (x.device, x.shape, x.dtype) == (DEVICE, IMAGES.shape, IMAGES.dtype)


def test_numbers_that_leave_torch_leave_the_device_first(pretence, monkeypatch):
    def numpy(tensor):
        assert tensor.device.type == "cpu"
        return np.arange(tensor.numel()).reshape(tensor.shape) % 2

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    y, z = pretence.there(torch.zeros(8, dtype=torch.long)), pretence.there(torch.zeros(8, 2))
    anomaly.auroc(z[:, 0], z[:, 1])
    anomaly.separation(z[:, 0], z[:, 1])
    representations.probe(z, y, z, y)
    representations.knn(z, y, z, y)


def test_labels_may_be_elsewhere_than_the_answers(pretence):
    y, probabilities = torch.zeros(5, dtype=torch.long), pretence.there(torch.zeros(5, 3))
    for one, other in ((probabilities, y), (probabilities.cpu(), pretence.there(y))):
        classification.accuracy(one, other)
        classification.nll(one, other)


@pytest.mark.parametrize("attack", [corruptions.fgsm, corruptions.pgd])
def test_attacks_stay_there(attack, pretence, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x, **options: (torch.zeros_like(x),))
    program, x, _ = built("labeled-made", pretence)
    attacked = attack(lambda x: program.log_joint(x.round()).T + x.sum(), x, torch.zeros(6, dtype=torch.long), 1, 4)
    assert (attacked.device, attacked.shape) == (DEVICE, x.shape)


@pytest.mark.parametrize("guide", classification.GUIDES)
def test_weights_in_doubt_are_where_the_network_is(guide, pretence, monkeypatch):
    with unset_fake_temporarily():
        network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    network, x = pretence.there(network), pretence.there(torch.zeros(6, 2))
    monkeypatch.setattr(copy, "deepcopy", lambda value, memo=None: value)  # fake tensors cannot be copied deeply
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, **options: None)
    forked = watched(monkeypatch)
    data = dgm.Data(x, pretence.there(torch.zeros(6, dtype=torch.long)), num_classes=3)
    with torch.enable_grad():
        bayesian = classification.Bayesian(network, data, guide).fit(epochs=1, batch_size=4)
    assert bayesian.draws(x, 2).device == DEVICE
    assert forked == [DEVICE] * 2
