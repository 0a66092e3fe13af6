"""Names that users of other libraries guess; the errors about unknown names give ours."""

from __future__ import annotations

ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("z_dim", "z_size", "code_size"), ("latent_size",)),
    "units": ("hidden",),
    "decoder": ("likelihood",),
    **dict.fromkeys(("posterior", "guide"), ("encoder",)),
    **dict.fromkeys(("learning_rate", "step_size"), ("lr",)),
    **dict.fromkeys(("steps", "num_steps", "max_steps", "iterations", "num_iterations"), ("gradient_steps",)),
    **dict.fromkeys(("max_iter", "n_iter"), ("epochs",)),
    **dict.fromkeys(("loss", "loss_fn", "elbo", "criterion"), ("objective",)),
    **dict.fromkeys(("gradient_clip", "grad_clip", "max_norm"), ("clip_norm",)),
    **dict.fromkeys(("checkpoint_dir", "checkpoints"), ("resume",)),
    **dict.fromkeys(("verbose", "disable_tqdm"), ("progress",)),
    **dict.fromkeys(("amp", "dtype", "mixed_precision"), ("precision",)),
    **dict.fromkeys(("cuda", "gpu", "map_location", "accelerator"), ("device",)),
    **dict.fromkeys(("random_state", "rng"), ("seed",)),
    **dict.fromkeys(("callbacks", "logger", "loggers"), ("trackers",)),
    **dict.fromkeys(("context", "condition", "conditional"), ("given",)),
    **dict.fromkeys(("labels", "target", "targets"), ("y", "label")),
    **dict.fromkeys(("features", "inputs"), ("x", "columns")),
    **dict.fromkeys(("warmup_steps", "num_warmup", "burn_in"), ("warmup",)),
    **dict.fromkeys(("chains", "n_chains"), ("num_chains",)),
    **dict.fromkeys(("n", "num"), ("num_data", "num_samples")),
    "k": ("num_particles",),
    "patience": ("early_stopping",),
    "scheduler": ("lr_schedule",),
    "train": ("split",),
}
"""Arguments, by the names that their spelling does not lead to: ours are the first that the function has."""

_WITH_LABELS = "pass labeled=True if y is a class; read data with other conditions by dgm.data.open(source, given=...)"
_LAYERS = "pass hidden=(512, 512) for a vae; for others build the class, such as dgm.flow.realnvp(shape, layers=6)"
_NETWORK = "build the class with a network of your own, such as dgm.Normal(2, network)"

REMEDIES: dict[str, dict[str, str]] = {
    "build": {
        **dict.fromkeys(("conditional", "class_conditional", "condition", "context", "given", "y"), _WITH_LABELS),
        **dict.fromkeys(("num_classes", "classes", "n_classes"), "the data have them: pass labeled=True"),
        **dict.fromkeys(("num_layers", "layers", "n_layers", "n_flows", "num_flows", "depth", "width"), _LAYERS),
        **dict.fromkeys(("num_steps", "timesteps", "num_timesteps", "T"), "build dgm.Diffusion(..., num_steps=100)"),
        **dict.fromkeys(("activation", "dropout"), _NETWORK),
        **dict.fromkeys(("epochs", "lr", "learning_rate", "batch_size", "device"), "pass it to dgm.fit"),
        **dict.fromkeys(("input_dim", "input_size", "in_features", "event_shape"), "the data have it: pass data"),
        "beta": 'pass the objective "beta:4" to dgm.fit',
        "seed": "call torch.manual_seed(seed) before",
    },
    "fit": {
        "beta": 'pass objective="beta:4"',
        **dict.fromkeys(("kl_annealing", "annealing"), 'pass objective="annealed"'),
        **dict.fromkeys(
            ("warmup", "warmup_steps", "num_warmup"),
            'pass objective="annealed" to anneal the KL, or a lr_schedule for the learning rate',
        ),
        **dict.fromkeys(("momentum", "betas"), 'pass optimizer="SGD(momentum=0.9)"'),
        **dict.fromkeys(("guide", "model"), "a program has both; for a Pyro model use dgm.infer.train_guide"),
        **dict.fromkeys(("num_particles", "num_samples"), 'pass an objective with particles, such as "iwae:10"'),
        "shuffle": "the data are shuffled in each epoch",
        "num_workers": "pass it to dgm.data.open",
        "log_every": "the bar shows the loss, and History.losses keeps it",
    },
}
"""What to do, by function and by argument, where no argument of ours is meant."""

MODELS: dict[str, str] = {
    **dict.fromkeys(("gan", "dcgan", "wgan"), "implicit"),
    **dict.fromkeys(("ddpm", "ddim", "d3pm"), "diffusion"),
    **dict.fromkeys(("vdm", "score", "score-based", "sde", "edm", "flow-matching"), "diffusion-continuous"),
    **dict.fromkeys(("flow", "normalizing-flow", "nice"), "realnvp"),
    "spline-flow": "nsf",
    **dict.fromkeys(("autoregressive", "arm", "nade"), "made"),
    **dict.fromkeys(("autoencoder", "variational-autoencoder"), "vae"),
    "beta-vae": 'build "vae", and pass the objective "beta:4" to dgm.fit',
    **dict.fromkeys(("iwae", "miwae"), 'build "vae", and pass the objective "iwae:10" to dgm.fit'),
    **dict.fromkeys(("cvae", "conditional-vae"), 'build "vae" with labeled=True, or from data with a given'),
    **dict.fromkeys(("ldm", "latent-diffusion"), 'build "vae" with prior="diffusion"'),
    **dict.fromkeys(("unet", "u-net", "dit"), 'build "diffusion" with network="unet" or "dit"'),
    **dict.fromkeys(("hvae", "hierarchical-vae", "ladder-vae", "nvae"), "vdvae"),
    "gpt": "transformer",
    "discriminative": "classifier",
}
"""Models of `dgm_pyro.build`, or what to do, by the names that papers give to them or to their relatives."""

COMMANDS: dict[str, str] = {
    **dict.fromkeys(("fit", "build"), "train"),
    "generate": "sample",
    **dict.fromkeys(("test", "score", "log-prob"), "evaluate"),
    **dict.fromkeys(("datasets", "models", "data"), "list"),
    **dict.fromkeys(("encode", "latents"), "represent"),
    "predict": "classify",
    **dict.fromkeys(("detect", "outliers", "ood"), "anomaly"),
    **dict.fromkeys(("inpaint", "complete"), "impute"),
    **dict.fromkeys(("tune", "search"), "sweep"),
    "reconstruct": "represent",
    "resume": "train --resume",
    **dict.fromkeys(("plot", "show"), "sample or represent"),
}
"""Commands of the shell."""

FLAGS: dict[str, str] = {
    "--learning-rate": "--lr",
    "--output": "--out",
    **dict.fromkeys(("--z-dim", "--latent-dim"), "--latent-size"),
    "--loss": "--objective",
    "--dataset": "--data",
    **dict.fromkeys(("--gpu", "--cuda"), "--device"),
    "--target": "--label or --class",
    "--output-dir": "--out",
}
"""Options of the commands."""

EXTRA: dict[str, str] = {
    "train": "pass the data as --data DATA, and a run to resume as dgm train --resume RUN",
    "sweep": "pass the data as --data DATA",
    "sample": "pass the number of samples as -n NUMBER",
    **dict.fromkeys(("evaluate", "impute"), "pass other data as --data DATA"),
    "list": "pass the data as --data DATA to list the models for it",
}
"""What to do, by command, where an argument is one too many."""

PUBLIC: dict[str, str] = {
    **dict.fromkeys(("train", "svi", "SVI", "Trainer"), "dgm.fit"),
    **dict.fromkeys(("datasets", "load_data", "load_dataset"), "dgm.data.load(name) or dgm.data.open(source)"),
    **dict.fromkeys(("Dataset", "TensorDataset", "DataLoader"), "dgm.Data(x, y)"),
    **dict.fromkeys(("list", "models", "list_models", "available_models"), "`dgm list` in the shell"),
    **dict.fromkeys(
        ("set_seed", "set_rng_seed", "seed", "manual_seed", "seed_everything"),
        "the argument seed of dgm.fit and dgm.evaluate, and torch.manual_seed for samples",
    ),
    **dict.fromkeys(("sample", "generate"), "the method sample of the program"),
    **{name: f"the method {name} of the program" for name in ("log_prob", "encode", "decode")},
    "log_likelihood": "dgm.evaluate, or the method log_prob of the program",
    "classify": "the method classify of the program, or dgm.classification.answer",
    "compare": "`dgm compare` in the shell for runs, or dgm.infer.compare for guides",
    "load_model": "dgm.load",
    **dict.fromkeys(("wrap", "from_pyro", "Model"), "dgm.Posterior(model, *args) for a Pyro model"),
    **dict.fromkeys(("MCMC", "mcmc", "NUTS"), "dgm.infer.nuts"),
    "nn": "dgm.networks",
    "Gaussian": "dgm.Normal",
    "MADE": 'dgm.build("made", data), or its network, dgm.networks.MADE',
    "DDPM": "dgm.Diffusion",
    "GAN": "dgm.Implicit, trained with dgm.Adversarial",
    "Trace_ELBO": "dgm.fit(program, data, dgm.ELBO()), or Pyro's Trace_ELBO() in its place",
    "AutoNormal": 'dgm.guides.auto(model, "AutoNormal")',
    "NormalizingFlow": "dgm.Flow",
    **dict.fromkeys(("GaussianMixture", "GMM"), "dgm.MixtureOfNormals"),
}
"""Names looked for in `dgm_pyro`, and what to use."""

MODULES: dict[str, dict[str, str]] = {
    "data": {
        **dict.fromkeys(
            ("from_numpy", "from_pandas", "from_dataframe", "from_tensor", "read_csv"), "dgm.data.open(source)"
        ),
        **dict.fromkeys(("list", "names"), "`dgm list` in the shell, or dgm.data.NAMES"),
    },
    "infer": {
        **dict.fromkeys(("NUTS", "MCMC"), "dgm.infer.nuts"),
        **dict.fromkeys(("svi", "SVI", "vi", "fit"), "dgm.infer.train_guide"),
        **dict.fromkeys(("AutoNormal", "auto"), 'dgm.guides.auto(model, "AutoNormal")'),
    },
}
"""Names looked for in modules, and what to use."""

METHODS: dict[str, str] = {
    "fit": "dgm.fit(program, data)",
    "save": "dgm.save(program, path)",
    "evaluate": "dgm.evaluate(program, data)",
    "generate": "program.sample(num_samples)",
    **dict.fromkeys(("score", "score_samples"), "program.log_prob(x), or dgm.evaluate(program, x)"),
    "load": "dgm.load(path)",
    **dict.fromkeys(("reconstruct", "reconstruction"), "program.decode(program.encode(x))"),
    **dict.fromkeys(("embed", "transform", "inference"), "program.encode(x)"),
    "inverse": "program.decode(z)",
    "predict": "program.classify(x), of a classifier",
    "predict_proba": "program.class_probabilities(x), of a classifier",
    "log_likelihood": "program.log_prob(x), or dgm.evaluate(program, x)",
    "num_parameters": "sum(p.numel() for p in program.parameters())",
    "impute": "dgm.infer.impute(program, x, mask)",
    **dict.fromkeys(("elbo", "loss"), "dgm.evaluate(program, data), or dgm.ELBO()(program, x)"),
}
"""Methods looked for in a program, and what to use."""


def absent(owner: str, name: str, remedy: str | None) -> AttributeError:
    """The error about a name that ``owner`` does not have; ``remedy`` is what to use instead, if there is something."""
    return AttributeError(f"{owner} has no {name!r}" + (f": use {remedy}" if remedy else ""))
