"""Names that users of other libraries guess; the errors about unknown names give ours."""

from __future__ import annotations

ARGUMENTS: dict[str, str] = {
    **dict.fromkeys(("z_dim", "z_size", "code_size"), "latent_size"),
    **dict.fromkeys(("layers", "units", "widths"), "hidden"),
    **dict.fromkeys(("decoder", "observation"), "likelihood"),
    **dict.fromkeys(("posterior", "guide", "inference_network", "q"), "encoder"),
    **dict.fromkeys(("learning_rate", "step_size"), "lr"),
    **dict.fromkeys(("steps", "num_steps", "max_steps", "iterations", "num_iterations"), "gradient_steps"),
    **dict.fromkeys(("loss", "loss_fn", "elbo", "criterion"), "objective"),
    **dict.fromkeys(("verbose", "disable_tqdm"), "progress"),
    **dict.fromkeys(("amp", "dtype", "mixed_precision"), "precision"),
    **dict.fromkeys(("cuda", "gpu", "map_location", "accelerator"), "device"),
    **dict.fromkeys(("random_state", "rng"), "seed"),
    **dict.fromkeys(("context", "condition", "conditional"), "given"),
    **dict.fromkeys(("callbacks", "logger", "loggers"), "trackers"),
    **dict.fromkeys(("labels", "target", "targets"), "y"),
    **dict.fromkeys(("features", "inputs"), "x"),
    "patience": "early_stopping",
    "scheduler": "lr_schedule",
}
"""Arguments, by the names that their spelling does not lead to."""

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
}
"""Commands of the shell."""

FLAGS: dict[str, str] = {
    "--learning-rate": "--lr",
    "--output": "--out",
    "--z-dim": "--latent-size",
    "--loss": "--objective",
    "--dataset": "--data",
}
"""Options of the commands."""

PUBLIC: dict[str, str] = {
    **dict.fromkeys(("train", "svi", "SVI"), "dgm.fit"),
    **dict.fromkeys(("datasets", "load_data", "load_dataset", "Dataset"), "dgm.data.load or dgm.data.open"),
    **dict.fromkeys(("list", "models", "list_models"), "`dgm list` in the shell"),
    **dict.fromkeys(
        ("set_seed", "set_rng_seed", "seed", "manual_seed"),
        "the argument seed of dgm.fit and dgm.evaluate, and torch.manual_seed for samples",
    ),
    **dict.fromkeys(("sample", "generate"), "the method sample of the program"),
    **{name: f"the method {name} of the program" for name in ("log_prob", "encode", "decode")},
    "classify": "dgm.classification",
    "MADE": 'dgm.build("made", data), or its network, dgm.networks.MADE',
    "DDPM": "dgm.Diffusion",
    "GAN": "dgm.Implicit, trained with dgm.Adversarial",
    "Trace_ELBO": "dgm.ELBO or that of pyro.infer, as the objective of dgm.fit",
    "AutoNormal": "dgm.guides.auto",
}
"""Names looked for in `dgm_pyro`, and what to use."""

METHODS: dict[str, str] = {
    "fit": "dgm.fit(program, data)",
    "save": "dgm.save(program, path)",
    "evaluate": "dgm.evaluate(program, data)",
    "generate": "program.sample(num_samples)",
    "reconstruct": "program.decode(program.encode(x))",
    "impute": "dgm.infer.impute(program, x, mask)",
    **dict.fromkeys(("elbo", "loss"), "dgm.evaluate(program, data), or dgm.ELBO()(program, x)"),
}
"""Methods looked for in a program, and what to use."""
