"""Checkpoints: what goes in comes out bit by bit, and what is no checkpoint says so."""

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import programs
import pytest
import safetensors.torch
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import checkpoint, files
from dgm_pyro.checkpoint import LAYERS, CheckpointError, read_extra

NAN = float("nan")


@dgm.register
class Ring(dgm.Conditional):
    """A program as a user writes one: options of every kind, a tensor, a network, further keywords."""

    def __init__(self, radii, *networks, options=None, center=None, scale=1.0, **more):
        super().__init__()
        self.event_shape = torch.Size((len(radii),))
        self.radii, self.options, self.scale, self.more = radii, options, scale, more
        self.networks = nn.ModuleList(networks)
        self.register_buffer("center", torch.zeros(len(radii)) if center is None else center)

    def forward(self, given=None):
        return torch.distributions.Normal(self.center, self.scale)


def same(a, b):
    return type(a) is type(b) and (a == b or a != a)


def round_trip(program, folder, **options):
    dgm.save(program, folder)
    return dgm.load(folder, **options)


def densities(program, x, given):
    torch.manual_seed(7)
    with torch.no_grad():
        return programs.score(program, x, given, num_particles=3)


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", programs.CASES)
def test_a_program_is_bit_equal_after_a_round_trip(name, dtype, tmp_path):
    """Also where the reader's default dtype is not the writer's."""
    case = programs.CASES[name]
    with programs.precision(dtype):
        program = case.build()
        x, given = case.draw(program, 4)
        dgm.save(program, tmp_path)
    with programs.precision(torch.float64 if dtype == torch.float32 else torch.float32):
        loaded = dgm.load(tmp_path)
    with programs.precision(dtype):
        assert all(parameter.dtype == dtype for parameter in loaded.parameters())
        assert torch.equal(densities(loaded, x, given), densities(program, x, given))
        torch.manual_seed(1)
        drawn = program.sample(4, given)
        torch.manual_seed(1)
        again = loaded.sample(4, given)
        assert again.dtype == drawn.dtype
        assert torch.equal(again, drawn)
    assert type(loaded) is type(program)
    assert (loaded.event_shape, loaded.levels) == (program.event_shape, program.levels)
    assert loaded.given_shape == program.given_shape
    assert [*loaded.state_dict()] == [*program.state_dict()]
    assert repr(loaded) == repr(program)


@pytest.mark.gpu
@pytest.mark.parametrize("name", programs.CASES)
def test_a_checkpoint_moves_between_devices(name, tmp_path):
    case = programs.CASES[name]
    program = case.build(device="cuda")
    loaded = round_trip(program, tmp_path, device="cuda")
    x, given = case.draw(program, 4, device="cuda")
    assert all(tensor.device.type == "cuda" for tensor in loaded.state_dict().values())
    assert torch.equal(densities(loaded, x, given), densities(program, x, given))
    assert all(tensor.device.type == "cpu" for tensor in dgm.load(tmp_path).state_dict().values())


def test_a_checkpoint_survives_a_change_of_the_default_dtype(tmp_path):
    with programs.precision(torch.float64):
        program = programs.CASES["vae"].build()
        dgm.save(program, tmp_path)
    loaded = dgm.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(program.parameters(), loaded.parameters(), strict=True))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}


def test_mixed_dtypes_are_kept(tmp_path):
    program = programs.CASES["vae"].build()
    program.prior.double()
    loaded = round_trip(program, tmp_path)
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {
        name: t.dtype for name, t in program.state_dict().items()
    }


ARGUMENTS = {
    "none": None,
    "booleans": (True, False),
    "integers": (0, -1, 2**70),
    "floats": (0.1, -0.0, 5e-324, 1.7976931348623157e308),
    "not finite": (math.inf, -math.inf, math.nan),
    "strings": ("", "näh \n 'quoted' \"twice\"", "$tuple"),
    "lists in tuples": ([1, (2, [3.0])], (), []),
    "a size": torch.Size((1, 28, 28)),
    "a dict": {"$tuple": 1, "nested": {"": (1,)}},
    "a dict of integers": {0: 1.5, -7: {2**70: None}},
    "a dtype": torch.float64,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_keep_their_values_and_types(name, tmp_path):
    def flat(value):
        if isinstance(value, dict):
            return [type(value), *value, *(leaf for item in value.values() for leaf in flat(item))]
        if isinstance(value, list | tuple):
            return [type(value), *(leaf for item in value for leaf in flat(item))]
        return [value]

    loaded = round_trip(Ring([1, 2], options=ARGUMENTS[name], more=ARGUMENTS[name]), tmp_path)
    for back in (loaded.options, loaded.more["more"]):
        before, after = flat(ARGUMENTS[name]), flat(back)
        assert len(before) == len(after)
        assert all(same(a, b) for a, b in zip(before, after, strict=True))
    assert math.copysign(1, flat(loaded.options)[2]) == -1 if name == "floats" else True


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    loaded = round_trip(Ring([np.int64(3)], scale=np.float64(0.5), options=np.bool_(True)), tmp_path)
    assert [type(v) for v in (loaded.radii[0], loaded.scale, loaded.options)] == [int, float, bool]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensor_arguments_are_bit_equal(dtype, tmp_path):
    center = torch.arange(6).reshape(2, 3).to(dtype).T  # not contiguous
    loaded = round_trip(Ring([1, 2, 3], options=center, center=center), tmp_path)
    for tensor in (loaded.options, loaded.center):
        assert tensor.dtype == dtype
        assert torch.equal(tensor, center)


def test_tensors_without_dimensions_or_elements_are_kept(tmp_path):
    loaded = round_trip(Ring([1], options=(torch.tensor(2.5), torch.zeros(0, 3))), tmp_path)
    assert loaded.options[0].item() == 2.5
    assert loaded.options[1].shape == (0, 3)


def test_positional_and_further_keyword_arguments_come_back(tmp_path):
    program = Ring([1], nn.Linear(2, 3), nn.Tanh(), scale=2.0, color="red", network=nn.Linear(1, 1))
    loaded = round_trip(program, tmp_path)
    assert repr(loaded) == repr(program)
    assert loaded.more["color"] == "red"


def test_layers_of_torch_are_rebuilt_with_every_option(tmp_path):
    layers = [
        *(nn.Linear(2, 3, bias=False), nn.Bilinear(2, 3, 4), nn.Embedding(5, 2, padding_idx=-1, max_norm=2.0)),
        *(nn.Identity(), nn.Flatten(2, -1), nn.Unflatten(1, (2, 3))),
        *(nn.Conv1d(2, 4, 3, padding="same"), nn.Conv3d(1, 1, (1, 2, 3))),
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False, padding_mode="circular"),
        *(
            nn.ConvTranspose1d(1, 2, 3),
            nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1),
            nn.ConvTranspose3d(1, 1, 2),
        ),
        *(nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(3, init=0.1), nn.ELU(0.5), nn.CELU(2.0)),
        *(nn.SELU(), nn.SiLU(), nn.GELU("tanh"), nn.Mish(), nn.GLU(1), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid()),
        *(nn.Softplus(2.0, 10.0), nn.Softsign(), nn.Softmax(dim=1), nn.LogSoftmax(dim=-1), nn.Hardswish()),
        *(nn.Dropout(0.1), nn.Dropout1d(0.2), nn.Dropout2d(0.3), nn.Dropout3d(0.4)),
        *(nn.LayerNorm((3, 4), eps=1e-3, bias=False), nn.LayerNorm(3, elementwise_affine=False), nn.RMSNorm(4)),
        *(nn.GroupNorm(2, 4, affine=False), nn.BatchNorm1d(3, momentum=None), nn.BatchNorm2d(3, affine=False)),
        nn.BatchNorm3d(2, track_running_stats=False),
        *(nn.MaxPool1d(2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool1d(2), nn.AvgPool2d((2, 1))),
        *(nn.AdaptiveAvgPool1d(3), nn.AdaptiveAvgPool2d((1, None)), nn.Upsample(scale_factor=2.0, mode="bilinear")),
        *(nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ZeroPad1d(1), nn.ZeroPad2d((1, 0, 1, 0))),
    ]
    assert {type(layer) for layer in layers} == {*LAYERS.values()}
    program = Ring([1], *layers)
    loaded = round_trip(program, tmp_path)
    for before, after in zip(layers, loaded.networks, strict=True):
        public = {k: v for k, v in vars(before).items() if not k.startswith("_")}
        assert {k: v for k, v in vars(after).items() if not k.startswith("_")} == public
        assert all(torch.equal(before.state_dict()[key], value) for key, value in after.state_dict().items())
        assert repr(after) == repr(before)


def test_containers_keep_names_order_and_nesting(tmp_path):
    tower = nn.Sequential()
    tower.add_module("last", nn.Linear(2, 2))
    tower.add_module("first", nn.Sequential(nn.Tanh(), nn.Sequential()))
    table = nn.ModuleDict({"b": nn.Linear(1, 1), "a": nn.ModuleList([nn.ReLU(), nn.Linear(3, 1)])})
    program = Ring([1], tower, table)
    loaded = round_trip(program, tmp_path)
    assert repr(loaded) == repr(program)
    assert [*loaded.state_dict()] == [*program.state_dict()]


def test_a_module_used_twice_stays_one_module(tmp_path):
    shared = nn.Linear(2, 4)
    twice = nn.Sequential(nn.Linear(2, 2), tanh := nn.Tanh(), nn.Linear(2, 4), tanh)
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(2, shared), dgm.Normal(2, shared))
    loaded = round_trip(program, tmp_path)
    assert loaded.likelihood.network is loaded.encoder.network
    assert len([*loaded.parameters()]) == len([*program.parameters()]) == 2
    within = round_trip(dgm.Normal(2, twice), tmp_path).network
    assert within[1] is within[3]
    [weights] = tmp_path.glob("weights-*")
    assert sum(tensor.numel() for tensor in safetensors.torch.load_file(weights).values()) == 6 + 12


def test_frozen_parameters_and_evaluation_mode_are_kept(tmp_path):
    program = dgm.Normal(2, nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))).eval()
    program.network[0].weight.requires_grad_(False)
    loaded = round_trip(program, tmp_path)
    assert [p.requires_grad for p in loaded.parameters()] == [False, True]
    assert not any(module.training for module in loaded.modules())
    assert all(module.training for module in round_trip(program.train(), tmp_path).modules())


def test_buffers_that_a_state_dict_leaves_out_are_kept(tmp_path):
    @dgm.register
    class Clock(dgm.Conditional):
        def __init__(self):
            super().__init__()
            self.event_shape = torch.Size((2,))
            self.register_buffer("ticks", torch.linspace(0, 1, 3), persistent=False)

    with programs.precision(torch.float64):
        program = Clock()
    loaded = round_trip(program, tmp_path)
    assert torch.equal(loaded.ticks, program.ticks)


def test_neither_saving_nor_loading_moves_the_random_numbers(tmp_path):
    program = programs.CASES["vae"].build()
    before = torch.get_rng_state()
    round_trip(program, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_program_trains_on(tmp_path):
    loaded = round_trip(programs.CASES["vae"].build(), tmp_path)
    programs.score(loaded, torch.randn(4, 2)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in loaded.parameters())


def test_extra_comes_back(tmp_path):
    extra = {"data": "digits", "epochs": 3, "history": [(1, 2.5), (2, math.nan)], "none": None}
    dgm.save(dgm.Normal(1), tmp_path, extra=extra)
    back = read_extra(tmp_path)
    assert math.isnan(back["history"][1].__getitem__(1))
    assert {**back, "history": 0} == {**extra, "history": 0}
    assert back["history"][0] == (1, 2.5)
    dgm.save(dgm.Normal(1), tmp_path)
    assert read_extra(tmp_path) is None


# -- writing -----------------------------------------------------------------------------------------------------------


def test_saving_again_replaces_the_checkpoint_and_nothing_else(tmp_path):
    mine = {"history.json", "weights-final.safetensors", f"weights-{'0' * 12}.safetensors", "state-1.safetensors"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    dgm.save(dgm.Normal(1), tmp_path)
    [old] = {path.name for path in tmp_path.iterdir()} - mine - {"program.json"}
    dgm.save(dgm.Normal(3), tmp_path)
    assert dgm.load(tmp_path).event_shape == (3,)
    names = {path.name for path in tmp_path.iterdir()}
    assert names > mine | {"program.json"}
    assert len(names) == len(mine) + 2
    assert old not in names


@pytest.mark.parametrize("failing_write", [0, 1])
@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, step, failing_write):
    program = programs.CASES["normal-learned"].build()
    dgm.save(program, tmp_path)
    calls = iter(range(9))
    function = "fsync" if step == "write" else "replace"
    genuine = getattr(files.os, function)

    def failing(*arguments):
        if next(calls) == failing_write:
            raise OSError("no space left on device")
        return genuine(*arguments)

    monkeypatch.setattr(files.os, function, failing)
    with pytest.raises(OSError, match="no space left"):
        dgm.save(dgm.Normal(5, learned=True), tmp_path)
    monkeypatch.undo()
    assert torch.equal(dgm.load(tmp_path).parameter, program.parameter)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    dgm.save(program, tmp_path)
    assert len([*tmp_path.iterdir()]) == 2


def test_weights_of_the_user_stay_and_those_of_a_killed_save_go(tmp_path):
    """Also where their names look alike."""
    mine = ["weights-final.safetensors", "weights-0123456789ab.safetensors", "weights-0123456789ab.safetensors.bak"]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    dgm.save(dgm.Normal(1, learned=True), tmp_path)
    content = safetensors.torch.save({"lost": torch.ones(2)})
    orphan = tmp_path / f"weights-{hashlib.sha256(content).hexdigest()[:12]}.safetensors"
    orphan.write_bytes(content)
    dgm.save(dgm.Normal(2, learned=True), tmp_path)
    assert not orphan.exists()
    assert all((tmp_path / name).read_bytes() == b"mine" for name in mine)
    assert len([*tmp_path.iterdir()]) == len(mine) + 2


def test_a_reader_beside_a_writer_reads_one_of_the_two(tmp_path, monkeypatch):
    """The writer replaces the checkpoint between the header and the weights that the reader reads."""
    dgm.save(dgm.Normal(3, learned=True), tmp_path)
    other = dgm.Normal(5, learned=True)
    read, written = checkpoint._read_header, []

    def overtaken(folder):
        header = read(folder)
        if not written:
            written.append(folder)
            dgm.save(other, folder)
        return header

    monkeypatch.setattr(checkpoint, "_read_header", overtaken)
    assert torch.equal(dgm.load(tmp_path).parameter, other.parameter)
    assert written


class Unregistered(nn.Linear):
    pass


def changed(change):
    program = programs.CASES["vae-two-levels"].build()
    change(program)
    return program


UNSAVABLE = {
    "no program": (lambda: nn.Linear(1, 2), TypeError, "program must be a dgm.Program, got Linear"),
    "a class that is not registered": (
        lambda: dgm.Normal(1, Unregistered(1, 2)),
        TypeError,
        r"network of Normal: test_checkpoint.Unregistered is not registered: put @dgm.register",
    ),
    "such a class deep inside": (
        lambda: dgm.Normal(1, nn.Sequential(nn.Sequential(Unregistered(1, 2)))),
        TypeError,
        r"network of Normal.0.0: test_checkpoint.Unregistered is not registered",
    ),
    "a layer that is not on the list": (lambda: Ring([1], nn.LSTM(1, 1)), TypeError, "LSTM is not registered"),
    "a function": (
        lambda: Ring([1], options=len),
        TypeError,
        "options of Ring is or holds a builtins.builtin_function",
    ),
    "a function in a tuple": (lambda: Ring([1], options=(1, [lambda: 0])), TypeError, "options of Ring.*function"),
    "a class as an option": (lambda: Ring([1], options=nn.ReLU), TypeError, "options of Ring.*builtins.type"),
    "an array": (lambda: Ring([1], options=np.zeros(2)), TypeError, "options of Ring.*numpy.ndarray.*tensors"),
    "a set": (lambda: Ring([1], options={1}), TypeError, "options of Ring.*builtins.set"),
    "a dict with other keys": (lambda: Ring([1], options={(1,): 2}), TypeError, "dicts with str or int keys"),
    "a part exchanged": (
        lambda: changed(lambda p: setattr(p, "encoder", Ring([1, 2]))),
        CheckpointError,
        r"VAE was changed after it was built: encoder is Ring, but was built as Normal",
    ),
    "a part added": (
        lambda: changed(lambda p: setattr(p, "critic", nn.Linear(1, 1))),
        CheckpointError,
        "critic is Linear, but was built as missing",
    ),
    "a layer made wider": (
        lambda: changed(lambda p: setattr(p.prior.prior, "parameter", torch.zeros(2, 7))),
        CheckpointError,
        r"prior.prior.parameter is \(2, 7\), but was built as \(2, 1\)",
    ),
    "parameters tied": (
        lambda: changed(lambda p: setattr(p.likelihood.network.rest[0], "bias", p.encoder.network.rest[0].bias)),
        CheckpointError,
        r"encoder.network.rest.0.bias is \(4,\) shared with likelihood.network.rest.0.bias",
    ),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_cannot_be_stored_says_so_and_writes_nothing(case, tmp_path):
    make, error, message = UNSAVABLE[case]
    with pytest.raises(error, match=message):
        dgm.save(make(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_numbers_are_not_stored(tmp_path):
    program = dgm.Normal(2, learned=True)
    dgm.save(program, tmp_path)
    with torch.no_grad():
        program.parameter[0] = NAN
    with pytest.raises(CheckpointError, match="parameter of this Normal holds NaN: train it again"):
        dgm.save(program, tmp_path)
    assert torch.isfinite(dgm.load(tmp_path).parameter).all()


def test_numbers_that_are_infinite_on_purpose_come_back(tmp_path):
    program = Ring((1.0, 2.0), center=torch.tensor([math.inf, -math.inf]))
    assert torch.equal(round_trip(program, tmp_path).center, program.center)


def test_extra_holds_plain_values_only(tmp_path):
    with pytest.raises(TypeError, match=r"extra is or holds a torch.Tensor.*use numbers, strings, tuples"):
        dgm.save(dgm.Normal(1), tmp_path, extra={"x": torch.zeros(1)})


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="run is a file"):
        dgm.save(dgm.Normal(1), tmp_path / "run")


# -- reading what is no checkpoint -------------------------------------------------------------------------------------


def weights(folder):
    [path] = folder.glob("weights-*.safetensors")
    return path


def edit(change):
    """A change to the parsed program.json."""

    def damage(folder):
        header = json.loads((folder / "program.json").read_text())
        header = change(header) or header
        (folder / "program.json").write_text(json.dumps(header))

    return damage


def resealed(content):
    """Other weights, with a header that vouches for them."""

    def damage(folder):
        digest = hashlib.sha256(content).hexdigest()
        edit(lambda header: header.update(weights={"sha256": digest, "bytes": len(content)}))(folder)
        (folder / f"weights-{digest[:12]}.safetensors").write_bytes(content)

    return damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def node(index, **changes):
    return edit(lambda header: header["modules"][index].update(changes))


BAD_FOLDERS = {
    "an empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "is not a checkpoint.*it has no program"),
    "no header": (lambda f: (f / "program.json").unlink(), "it has no program.json"),
    "no weights": (lambda f: weights(f).unlink(), "lacks its weights, weights-.*copy the whole folder"),
    "empty header": (lambda f: (f / "program.json").write_text(""), r"program.json is corrupted"),
    "truncated header": (
        lambda f: (f / "program.json").write_bytes((f / "program.json").read_bytes()[:-9]),
        "program.json is corrupted",
    ),
    "binary header": (lambda f: (f / "program.json").write_bytes(b"\xff\xfe\x00"), "program.json is corrupted"),
    "bottomless header": (lambda f: (f / "program.json").write_text("[" * 10**5), "program.json is corrupted"),
    "a pickle": (lambda f: (f / "program.json").write_bytes(pickle.dumps({})), "program.json is corrupted"),
    "a list": (edit(lambda header: [1]), "was written by another program"),
    "foreign JSON": (edit(lambda header: {"name": "left-pad"}), "was written by another program"),
    "another format": (edit(lambda header: header.update(format="onnx")), "was written by another program"),
    "a newer format": (
        edit(lambda header: header.update(format_version=99, versions={"dgm_pyro": "9.1"}, modules="?")),
        r"format version 99, written by dgm_pyro 9.1, but dgm_pyro 0.1.0 reads versions up to 5: upgrade",
    ),
    "no version": (edit(lambda header: header.pop("format_version") and None), "format version is None"),
    "no modules": (edit(lambda header: header.pop("modules") and None), "corrupted.*'modules'"),
    "empty modules": (edit(lambda header: header.update(modules=[])), "corrupted"),
    "modules that are no objects": (edit(lambda header: header.update(modules=["Normal"])), "corrupted"),
    "a module after its use": (edit(lambda header: header["modules"].reverse()), "corrupted"),
    "a network at the top": (edit(lambda header: header["modules"].pop() and None), "describes a Linear"),
    "no weights entry": (edit(lambda header: header.pop("weights") and None), "corrupted.*'weights'"),
    "a path for a sha256": (edit(lambda header: header["weights"].update(sha256="../../etc")), "is not a sha256"),
    "weights of many times the size": (
        lambda f: os.truncate(weights(f), 10**12),  # sparse: it has no content to be read
        "is damaged: its sha256",
    ),
    "a layer far larger than the weights": (
        node(0, arguments={"in_features": 30_000, "out_features": 30_000}),
        "Linear can no longer be built with .*: it is far larger than the weights",
    ),
    "more layers than there is memory for": (
        edit(
            lambda header: header.update(
                modules=[{"class": "torch.nn.Linear", "arguments": {"in_features": 1500, "out_features": 1500}}]
                * 10_000
            )
        ),
        "it is far larger than the weights",
    ),
    "modules that hold each other in 2^40 ways": (
        edit(
            lambda header: header.update(
                modules=[{"class": "torch.nn.Sequential", "children": {}}]
                + [{"class": "torch.nn.Sequential", "children": {"0": i, "1": i}} for i in range(40)]
            )
        ),
        "corrupted .*a torch.nn.Sequential uses more than 100,000 modules",
    ),
    "arguments that do": (
        edit(
            lambda header: header.update(
                modules=header["modules"][:1]
                + [
                    {"class": "Normal", "arguments": {"event_shape": 1, "network": {"$tuple": [{"$module": i}] * 2}}}
                    for i in range(40)
                ]
            )
        ),
        "corrupted .*a Normal uses more than 100,000 modules",
    ),
    "a size of 70 bits": (
        node(-1, arguments={"event_shape": {"$size": [2**70]}}),
        "Normal can no longer be built.*Overflow",
    ),
    "truncated weights": (
        lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-7]),
        r"weights-.* is truncated: it has \d+ of \d+ bytes",
    ),
    "empty weights": (lambda f: weights(f).write_bytes(b""), "truncated: it has 0 of"),
    "one bit flipped": (lambda f: flip(weights(f)), "is damaged: its sha256"),
    "weights with an appendix": (lambda f: weights(f).write_bytes(weights(f).read_bytes() + b"x"), "is damaged"),
    "a pickle for weights": (resealed(pickle.dumps({"a": 1})), "is not a safetensors file"),
    "weights of another program": (
        resealed(safetensors.torch.save({"other": torch.zeros(3)})),
        r"no longer fit the weights: network.weight has shape \(4, 3\) in this Normal, but is missing",
    ),
    "weights of another size": (
        resealed(safetensors.torch.save({"network.weight": torch.zeros(8, 3), "network.bias": torch.zeros(4)})),
        r"network.weight has shape \(4, 3\) in this Normal, but has shape \(8, 3\).*written by dgm_pyro 0.1.0",
    ),
    "weights reduced to bytes": (
        resealed(safetensors.torch.save({"network.weight": torch.ones(4, 3).char(), "network.bias": torch.zeros(4)})),
        r"weights-\w+.safetensors: network.weight is stored as torch.int8, but this Normal computes with torch.float32",
    ),
    "a weight that is no number": (
        resealed(safetensors.torch.save({"network.weight": torch.ones(4, 3), "network.bias": torch.full((4,), NAN)})),
        r"weights-\w+.safetensors: network.bias holds NaN: train the program again",
    ),
    "an unknown class": (
        node(-1, **{"class": "Mystery"}),
        "names the class 'Mystery', which is not registered: import the module that defines it",
    ),
    "a class of another library": (node(0, **{"class": "os.system"}), "'os.system', which is not registered"),
    "a layer that is not on the list": (node(0, **{"class": "torch.nn.LSTM"}), "'torch.nn.LSTM', which is not"),
    "an argument renamed": (
        node(-1, arguments={"shape": 2}),
        "Normal can no longer be built with the checkpoint's arguments shape: ",
    ),
    "an argument out of range": (
        node(-1, arguments={"event_shape": -2}),
        "Normal can no longer be built.*event_shape: event_shape must be a positive int",
    ),
    "an argument of no known kind": (node(-1, arguments={"event_shape": {"$code": "1 + 1"}}), r"corrupted.*\$code"),
    "an argument with two kinds": (node(-1, arguments={"event_shape": {"$tuple": [2], "$list": []}}), "corrupted"),
    "a tensor that is not there": (
        node(-1, arguments={"event_shape": 2, "parameters": {"$tensor": "argument/3"}}),
        "corrupted.*argument/3",
    ),
    "an unknown dtype": (node(-1, arguments={"event_shape": {"$dtype": "torch.nn"}}), "corrupted"),
    "a number that is none": (node(-1, arguments={"event_shape": {"$float": "one"}}), "corrupted"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_checkpoints_give_one_clear_error(case, tmp_path):
    dgm.save(dgm.Normal(2, nn.Linear(3, 4)), tmp_path / "run")
    damage, message = BAD_FOLDERS[case]
    damage(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message) as error:
        dgm.load(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_missing_path_is_named(tmp_path):
    for function in (dgm.load, read_extra):
        with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere"):
            function(tmp_path / "nowhere")


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"model.pt is not a checkpoint of dgm_pyro"):
        dgm.load(tmp_path / "model.pt")


def test_checkpoint_errors_are_value_errors():
    assert issubclass(CheckpointError, ValueError)


def test_a_checkpoint_loads_without_an_import_of_its_classes(tmp_path):
    dgm.save(dgm.Labeled(dgm.Categorical((), 3, learned=True), dgm.flow.realnvp(2, num_classes=3)), tmp_path / "it")
    code = f"import dgm_pyro.checkpoint; print(type(dgm_pyro.checkpoint.load({str(tmp_path / 'it')!r})).__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("Labeled\n", "")
