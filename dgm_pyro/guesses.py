"""Names that users of other libraries guess; the errors about unknown names give ours."""

from __future__ import annotations

ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("z_dim", "z_size", "code_size"), ("latent_size",)),
    **dict.fromkeys(("units", "widths"), ("hidden",)),
    **dict.fromkeys(("decoder", "observation"), ("likelihood",)),
    **dict.fromkeys(("posterior", "guide", "inference_network", "q"), ("encoder",)),
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
    "k": ("num_particles",),
    "patience": ("early_stopping",),
    "scheduler": ("lr_schedule",),
    "train": ("split",),
}
"""Arguments, by the names that their spelling does not lead to: ours are the first that the function has."""

_WITH_LABELS = "pass labeled=True for p(y) p(x | y), or data with a given, dgm.data.open(source, given=...)"
_PARTS = "build its class, such as dgm.Diffusion(..., num_steps=100) or dgm.flow.realnvp(shape, layers=6)"

REMEDIES: dict[str, dict[str, str]] = {
    "build": {
        **dict.fromkeys(("conditional", "class_conditional", "condition", "context", "given", "y"), _WITH_LABELS),
        **dict.fromkeys(("num_classes", "classes", "n_classes"), "the data have them; " + _WITH_LABELS),
        **dict.fromkeys(("num_layers", "layers", "n_layers", "n_flows", "num_flows", "depth", "width"), _PARTS),
        **dict.fromkeys(("num_steps", "timesteps", "num_timesteps", "T", "activation", "dropout"), _PARTS),
        **dict.fromkeys(("input_dim", "input_size", "in_features", "event_shape"), "the data have it: pass data"),
        "beta": 'pass the objective "beta:4" to dgm.fit',
        "seed": "call torch.manual_seed before",
    },
    "fit": {
        "beta": 'pass objective="beta:4"',
        **dict.fromkeys(("warmup", "kl_annealing", "annealing"), 'pass objective="annealed"'),
        **dict.fromkeys(("num_particles", "num_samples"), 'pass an objective with particles, such as "iwae:10"'),
        "shuffle": "the data are shuffled in each epoch",
        "num_workers": "pass it to dgm.data.open",
        "log_every": "pass trackers",
    },
}
"""What to do, by function and by argument, where no argument of ours is meant."""

MODELS: dict[str, str] = {
    **dict.fromkeys(("gan", "dcgan", "wgan"), "implicit"),
    **dict.fromkeys(("ddpm", "ddim"), "diffusion"),
    **dict.fromkeys(("vdm", "score", "score-based", "sde", "edm"), "diffusion-continuous"),
    **dict.fromkeys(("flow", "normalizing-flow", "nice"), "realnvp"),
    **dict.fromkeys(("autoregressive", "arm", "nade"), "made"),
    **dict.fromkeys(("beta-vae", "conditional-vae", "cvae", "iwae", "miwae"), "vae"),
    **dict.fromkeys(("hvae", "hierarchical-vae", "ladder-vae", "nvae"), "vdvae"),
    **dict.fromkeys(("gpt", "decoder"), "transformer"),
    **dict.fromkeys(("logistic-regression", "discriminative"), "classifier"),
}
"""Models of `dgm_pyro.build`, by the names that papers give to them or to their relatives."""

COMMANDS: dict[str, str] = {
    **dict.fromkeys(("fit", "build"), "train"),
    **dict.fromkeys(("generate", "draw"), "sample"),
    **dict.fromkeys(("test", "score", "log-prob"), "evaluate"),
    **dict.fromkeys(("datasets", "models", "data"), "list"),
    **dict.fromkeys(("encode", "latents"), "represent"),
    "predict": "classify",
    "reconstruct": "represent",
    "resume": "train --resume",
    **dict.fromkeys(("plot", "show"), "sample or represent"),
}
"""Commands of the shell."""

FLAGS: dict[str, str] = {
    "--learning-rate": "--lr",
    "--output": "--out",
    "--z-dim": "--latent-size",
    "--loss": "--objective",
    "--dataset": "--data",
    **dict.fromkeys(("--gpu", "--cuda"), "--device"),
    "--target": "--label",
    "--latent-dim": "--latent-size",
}
"""Options of the commands."""

EXTRA: dict[str, str] = {
    **dict.fromkeys(("train", "sweep"), "the data set or path is --data, and a run goes on by dgm train --resume RUN"),
    "sample": "the number of samples is -n",
    **dict.fromkeys(("evaluate", "impute", "represent"), "other data are --data"),
    "list": "dgm list --data DATA lists the models for it",
}
"""What to do, by command, where an argument is one too many."""

PUBLIC: dict[str, str] = {
    **dict.fromkeys(("train", "svi", "SVI", "Trainer"), "dgm.fit"),
    **dict.fromkeys(("datasets", "load_data", "load_dataset", "Dataset"), "dgm.data.load or dgm.data.open"),
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
    "Trace_ELBO": "dgm.ELBO or that of pyro.infer, as the objective of dgm.fit",
    "AutoNormal": "dgm.guides.auto",
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
        **dict.fromkeys(("AutoNormal", "auto"), "dgm.guides.auto"),
    },
}
"""Names looked for in modules, and what to use."""

METHODS: dict[str, str] = {
    "fit": "dgm.fit(program, data)",
    "save": "dgm.save(program, path)",
    "evaluate": "dgm.evaluate(program, data)",
    "generate": "program.sample(num_samples)",
    **dict.fromkeys(("score", "score_samples"), "program.log_prob(x), or dgm.evaluate(program, x)"),
    **dict.fromkeys(("reconstruct", "reconstruction"), "program.decode(program.encode(x))"),
    **dict.fromkeys(("embed", "transform", "inference"), "program.encode(x)"),
    "inverse": "program.decode(z)",
    **dict.fromkeys(("predict", "predict_proba"), "program.classify(x), of a classifier"),
    "num_parameters": "sum(p.numel() for p in program.parameters())",
    "impute": "dgm.infer.impute(program, x, mask)",
    **dict.fromkeys(("elbo", "loss"), "dgm.evaluate(program, data), or dgm.ELBO()(program, x)"),
}
"""Methods looked for in a program, and what to use."""
