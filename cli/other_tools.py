"""Words that people know from other tools, and how saesteer says the same."""

import re
from collections.abc import Collection

_PER_TOKEN = (
    "no loss is weighted by hand: give --k, latents per token, or --l0, with the architectures "
    "that aim at a number of them"
)
_LOGS = (
    "every run writes metrics.jsonl into --out, one JSON object for each log line, and "
    "`saesteer watch` shows its curves"
)
_VECTORS = "a file of vectors becomes a plan with convert --format plan, and --plan takes that"

_ANSWERS: dict[tuple[str, ...] | str, str] = {
    # what steers
    ("--latents", "--top", "--explain"): (
        "feature features feature-id feature-ids feature-idx feature-index latent latent-id "
        "latent-ids latent-idx latents-idx"
    ),
    ("--scale",): (
        "coef coefficient coefficients steering-coefficient steering-strength steering-scale"
    ),
    _VECTORS: "control-vector control-vectors vector vectors steering-vector",
    ("--plan",): "plan-path plans",
    ("--task",): "behavior behaviour concept task-name tasks instruction-name",
    ("--beside", "--baseline"): "compare comparison",
    # training
    ("--lr",): "learning-rate",
    _PER_TOKEN: (
        "l1 l1-coefficient l1-coeff l1-alpha l1-penalty sparsity-penalty sparsity-coefficient "
        "l0-coefficient l0-lambda l0-penalty"
    ),
    ("--d-sae",): (
        "dict-size dictionary-size num-latents n-latents d-hidden d-dict sae-width width "
        "hidden-size"
    ),
    "--d-sae, which takes the number of latents, not a multiple of d_model": (
        "expansion-factor expansion"
    ),
    "--tokens, which is --batch-tokens times the number of steps": (
        "steps n-steps num-steps max-steps total-steps training-steps train-steps"
    ),
    ("--tokens",): (
        "training-tokens total-training-tokens num-tokens n-tokens total-tokens max-train-tokens"
    ),
    ("--batch-tokens",): "train-batch-size-tokens train-batch-size sae-batch-size out-batch-size",
    ("--buffer-tokens",): "buffer-size n-batches-in-buffer n-ctxs mixing-buffer-size",
    ("--warmup-steps",): "warmup lr-warm-up-steps lr-warmup-steps warmup-ratio",
    ("--decay-share",): "lr-decay-steps decay-start lr-scheduler lr-scheduler-name",
    ("--dead-after-tokens",): (
        "dead-feature-window dead-feature-threshold dead-latent-window feature-sampling-window"
    ),
    ("--auxk",): "auxk-alpha aux-loss-coefficient aux-coefficient auxk-coefficient",
    ("--arch",): "architecture sae-type sae-class activation-fn trainer",
    ("--clip-norm",): "grad-clip clip-grad-norm max-grad-norm gradient-clipping",
    ("--micro-batch-tokens",): "micro-acc-steps grad-acc-steps gradient-accumulation-steps",
    ("--epochs",): "num-epochs n-epochs num-train-epochs",
    ("--init-seed", "--seed"): "init-seeds random-seed",
    ("--prefixes",): "matryoshka-widths group-sizes group-fractions nested-sizes",
    _LOGS: (
        "wandb use-wandb log-to-wandb wandb-project wandb-entity wandb-name report-to tensorboard "
        "trackio log-to"
    ),
    ("--checkpoint-every",): "n-checkpoints save-every save-steps checkpoint-interval",
    # the model and its text
    ("--model",): "model-name model-path model-name-or-path base-model lm-name hf-model",
    "--layer and --site": (
        "hook-name hook-point hookpoint hookpoints hook-points hook submodule submodule-name"
    ),
    ("--layer",): "hook-layer hook-point-layer layer-idx layer-index target-layer layer-id",
    ("--sae",): "sae-path sae-name dictionary dict-path",
    "--sae RELEASE:ID": "sae-release sae-id release",
    ("--data",): "dataset dataset-path dataset-name corpus text-file train-data",
    ("--context",): (
        "context-size context-length ctx-len ctx-length ctx seq-len seq-length max-seq-len "
        "max-seq-length"
    ),
    ("--batch-size",): (
        "store-batch-size store-batch-size-prompts llm-batch-size lm-batch-size "
        "per-device-batch-size"
    ),
    ("--quantize",): "load-in-8bit load-in-4bit quantization bits",
    ("--bos",): "prepend-bos add-bos no-bos",
    ("--dtype",): "fp16 bf16 fp32 precision torch-dtype half",
    ("--device",): "gpu cuda",
    # answers
    ("--max-new-tokens", "--tokens"): (
        "max-tokens max-length max-gen-len max-gen-tokens tokens-to-generate"
    ),
    "--temperature, where 0 is greedy": "temp greedy do-sample sampling",
    ("--top", "--k", "--top-p"): "top-k topk",
    ("--top-p",): "nucleus nucleus-p min-p",
    "--prompt, or --prompts for a file": "text input input-text input-file prompt-file questions",
    "--chat, or --no-chat": "chat-template apply-chat-template use-chat-template no-chat-template",
    ("--scope",): "token-position token-positions apply-to steer-positions",
    ("--n", "--rank-contents", "--tokens"): "num-samples n-samples num-examples limit max-samples",
    ("--by",): "metric score scoring ranking",
    "--judge, with --judge-model": "judge-url api-base base-url",
    "--judge, whose key is read from SAESTEER_JUDGE_KEY": "api-key openai-api-key",
    # every verb
    ("--out",): (
        "output output-dir output-path output-folder out-dir save-dir save-path save-to "
        "checkpoint-path checkpoint-dir run-name"
    ),
    ("--force",): "overwrite yes exist-ok",
    ("--resume",): "continue resume-from resume-from-checkpoint finetune",
    ("--config",): "config-file cfg",
    ("--verbose",): "debug log-level",
}  # fmt: skip
"""Ours, and the names of it elsewhere. A tuple holds flags of which a verb's first one is meant; a
text is for the verbs that have every flag in it."""

WORDS = {f"--{word}": ours for ours, words in _ANSWERS.items() for word in words.split()}
"""Each word from elsewhere with its answer in `_ANSWERS`."""

VERBS = {
    "generate": "steer", "chat": "steer", "run": "steer", "infer": "steer", "cache": "harvest",
    "collect": "harvest", "extract": "harvest", "activations": "harvest", "fit": "train",
    "eval": "evaluate", "bench": "evaluate", "benchmark": "evaluate", "search": "rank",
    "select": "rank", "tune": "sweep", "upload": "push", "share": "push",
    "export": "convert", "import": "convert", "check": "doctor", "quickstart": "demo",
    "rerun": "reproduce", "plot": "watch", "monitor": "watch", "tensorboard": "watch",
    "dashboard": "latents", "features": "latents", "interpret": "latents", "explain": "latents",
}  # fmt: skip
"""What other programs call our verbs."""


def answer(flag: str, known: Collection[str]) -> str | None:
    """What to type for another tool's flag, on a verb with the flags `known`; None if unknown."""
    ours = WORDS.get(flag.lower().replace("_", "-"))
    if ours is None:
        return None
    if isinstance(ours, tuple):
        found = next((one for one in ours if one in known), None)
        return None if found is None else f"here it is {found}"
    if not set(flags_in(ours)) <= set(known):
        return None
    return f"here it is {ours}" if ours.startswith("--") else ours


def flags_in(text: str) -> list[str]:
    """The flags that a text names."""
    return re.findall(r"(?<!convert )--[a-z][a-z0-9-]*", text)
