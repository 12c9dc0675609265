"""Any Hugging Face causal language model, whose decoder blocks are found by their structure."""

import contextlib
import hashlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from saesteer.checkpoints.errors import UsageError, UserError, reason_of
from saesteer.checkpoints.shown import Shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOWERS_THAT_ARE_NOT_TEXT = ("vision", "visual", "image", "audio", "speech", "encoder")


@dataclass(eq=False, repr=False)
class LanguageModel(Shown):
    """A causal language model with what the rest of the toolkit needs to know about it.

    `blocks` are the decoder blocks of the text tower, in order; `fingerprint` identifies the
    weights (see `weight_fingerprint`) and is written into every SAE, plan and run.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    blocks: nn.ModuleList
    blocks_path: str

    def _facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "blocks": self.n_layers,
            "d_model": self.d_model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "weights": self.fingerprint[:16],
        }

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(text_config(self.model).hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the first block computes."""
        weights_on = next(self.blocks.parameters()).device
        if weights_on.type != "meta":
            return weights_on
        # accelerate keeps the weights elsewhere and moves them here when they are needed.
        hooks = (getattr(module, "_hf_hook", None) for module in self.blocks.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((place for place in places if place is not None), "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream; quantised weights are stored as integers."""
        for parameter in self.blocks.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return next(self.blocks.parameters()).dtype

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def positions(self) -> int | None:
        """Most tokens a sequence may have, or None when the configuration does not say."""
        limit = getattr(text_config(self.model), "max_position_embeddings", None)
        return int(limit) if limit and limit > 0 else None  # XLNet says -1 for no limit

    @property
    def pad_id(self) -> int:
        """A token id to fill padding with; the attention mask hides it, so any will do that the
        embedding has a row for."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and 0 <= token < rows:
                return int(token)
        return 0

    @cached_property
    def special_ids(self) -> torch.Tensor:
        """Ids of tokens that are not text: excluded from training and from steering scopes."""
        # Both are made anew at every access, which for Gemma's 6,000 added tokens adds up.
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        ids = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        return torch.tensor(sorted(ids), dtype=torch.int64)

    @cached_property
    def text_model(self) -> nn.Module:
        """The innermost module around the blocks that takes token ids: running it computes no
        logits, unless only the whole model takes them."""
        path = self.blocks_path
        while path := path.rpartition(".")[0]:
            # What owns the blocks of BERT, GIT or Reformer takes embeddings only.
            module: nn.Module = self.model.get_submodule(path)
            if "input_ids" in inspect.signature(module.forward).parameters:
                return module
        whole: nn.Module = self.model
        return whole

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the unembedding, or None when there is none."""
        for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
            module = getattr(self.text_model, name, None)
            if isinstance(module, nn.Module):
                return module
        return None

    def keep_only(self, last: int) -> None:
        """Free every weight that a pass up to block `last` does not need: later blocks, the output
        embedding, other towers.

        Afterwards the model can only be run up to that block.
        """
        if getattr(self.model, "hf_device_map", None):
            return  # accelerate moves these weights around itself
        for block in self.blocks[last + 1 :]:
            _free(block)
        used = {id(module) for module in self.text_model.modules()}
        for module in self.model.modules():
            if id(module) not in used and not any(id(child) in used for child in module.modules()):
                _free(module)  # the input embedding keeps what a tied head loses

    @property
    def unembed(self) -> nn.Module:
        """The output embedding. Raises UserError for a model without one."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise UserError(f"`model` {self.name} has no output embedding: a causal LM is needed")
        return head  # type: ignore[no-any-return]


def _free(module: nn.Module) -> None:
    """Put a module's weights on the meta device, whatever they are.

    `module.to("meta")` fails for those that bitsandbytes has quantised: their class moves scales
    along with them, which cannot go there, and 8-bit layers hold their weights in a state beside.
    """
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, values in list(part._buffers.items()):
            if values is not None:
                part._buffers[name] = torch.empty_like(values, device="meta")
        for name in ("quant_state", "state"):
            if type(part).__module__.startswith("bitsandbytes.") and hasattr(part, name):
                setattr(part, name, None)


def uncompiled(model: Any) -> Any:
    """The module inside what `torch.compile` returns, where hooks are heard; others as they are."""
    return getattr(model, "_orig_mod", model)


def text_config(model: Any) -> Any:
    """The configuration of the text tower, also inside a multimodal wrapper."""
    return model.config.get_text_config(decoder=True)


def pick_device(device: str) -> torch.device:
    """`auto` is the first accelerator, else the CPU. Raises UsageError for an unknown name."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Each process of torchrun takes a GPU of its own.
        local = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local) if local else torch.device("cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"`device` must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"`device` must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"`device` {device} was asked for, but torch sees no CUDA device: use cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"`device` {device} does not exist: torch sees {torch.cuda.device_count()} CUDA "
            "devices, numbered from 0"
        )
    return chosen


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run on the device's own instructions."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # ATen exposes these two probes without a public name (checked with torch 2.8 to 2.13).
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it natively, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"`dtype` must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def weight_fingerprint(model: nn.Module, sample: int = 65536) -> str:
    """Sixteen hex digits that identify a model's weights, whatever file layout they came from.

    SHA-256 over every parameter's name and shape, and over up to `sample` evenly spaced values of
    each, rounded to bfloat16: so float32 and bfloat16 loads of one checkpoint agree, and a model of
    any size takes a moment. Two models that differ only in values that were not sampled collide.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        flat = _values(model, name, parameter).detach().reshape(-1)
        stride = max(1, -(-flat.numel() // sample))
        values = flat[::stride].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _values(model: nn.Module, name: str, parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's values, also where accelerate keeps them off the device."""
    if not parameter.is_meta:
        return parameter
    from accelerate.utils import align_module_device

    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module, "cpu"):
        return getattr(module, own_name).detach().clone()  # type: ignore[no-any-return]


def find_blocks(model: Any, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of the text tower: the outermost ModuleList of the right length.

    Names differ between model families (`layers`, `h`, `decoder.layers`); the number of hidden
    layers does not; LongCat Flash counts two for each of its `num_layers` blocks. `path` overrides
    the search. Raises UserError when nothing or more than one list fits.
    """
    config = text_config(model)
    for number in ("hidden_size", "num_hidden_layers"):
        if not hasattr(config, number):
            raise UserError(
                f"{type(config).__name__} says no {number}: the model is not one stack of decoder "
                "blocks of one width, so that it cannot be read; give another model"
            )
    if path is not None:
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            raise UserError(f"`blocks` {path}: the model has no such module") from None
        if not isinstance(blocks, nn.ModuleList):
            raise UserError(f"`blocks` {path} is a {type(blocks).__name__}, not a list of blocks")
        return path, blocks
    expected = config.num_hidden_layers
    lists = _lists_of(model, expected)
    if not lists and getattr(config, "num_layers", None):
        lists = _lists_of(model, config.num_layers)
    for unlike in (_is_no_text, _is_no_block):
        if len(lists) > 1:
            lists = [pair for pair in lists if not unlike(*pair)] or lists
    if len(lists) != 1:
        names = ", ".join(name for name, _ in lists) or "none"
        raise UserError(
            f"cannot tell which modules are the {expected} decoder blocks (candidates: {names}): "
            "name their list with `blocks` MODULE.PATH"
        )
    return lists[0]


def _lists_of(model: Any, length: int) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of so many modules, with their paths."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(outer + ".") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) == length and not inside_another:
            lists.append((name, module))
    return lists


def _is_no_text(path: str, blocks: nn.ModuleList) -> bool:
    return any(word in path.lower() for word in _TOWERS_THAT_ARE_NOT_TEXT)


def _is_no_block(path: str, blocks: nn.ModuleList) -> bool:
    """Single matrices, such as Gemma 3n's projections between streams."""
    return not any(True for block in blocks for _ in block.children())


def wrap_model(
    model: Any, tokenizer: Any, name: str = "in-memory", blocks_path: str | None = None
) -> LanguageModel:
    """Take a transformers model and tokenizer that are already in memory."""
    inner = uncompiled(model)
    path, blocks = find_blocks(inner, blocks_path)
    model.eval()
    return LanguageModel(model, tokenizer, name, weight_fingerprint(inner), blocks, path)


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    blocks_path: str | None = None,
    progress: Callable[[str], None] | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    recorded: bool = False,
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: Hub name, local folder, `.gguf` file, or alias (`smollm2-135m-instruct`).
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        blocks_path: module path of the list of decoder blocks when it cannot be found.
        progress: called with one line before a step that takes a while (fetching, converting).
        device_map: `auto` spreads the blocks over all devices with accelerate, and what does not
            fit over memory and disk; `device` is then not used.
        quantize: `8bit` or `4bit` with bitsandbytes while loading. The fingerprint is then of the
            quantised weights.
        trust_remote_code: run Python files that lie beside the weights. Otherwise none is ever run,
            and a model that needs its own is refused.
        recorded: the name is what a plan or an SAE says, see `resolve_model`; what uses it compares
            the fingerprint.

    Raises:
        UserError: nothing loadable under that name; the message says what to do.
    """
    from saesteer.checkpoints.model_files import hub_call, quiet, resolve_model
    from saesteer.checkpoints.model_kinds import check_vocabulary

    target = pick_device(device)
    chosen_dtype = pick_dtype(dtype, target)
    placed = _placement(device_map, quantize, target, chosen_dtype)
    resolved = resolve_model(name, progress, recorded=recorded)
    offline = resolved.local_files_only

    def read() -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        # The fingerprint rounds to bfloat16, and float16 cannot hold every bfloat16 value: load the
        # file's own dtype, take the fingerprint, and convert afterwards.
        first = "auto" if chosen_dtype == torch.float16 else chosen_dtype
        path = resolved.path_or_repo
        with _no_foreign_code(name):
            _check_config(path, offline, name, trust_remote_code)
            model = _from_pretrained(path, first, offline, placed, trust_remote_code)
            return model, AutoTokenizer.from_pretrained(
                path, local_files_only=offline, trust_remote_code=trust_remote_code
            )

    if offline:
        try:
            with quiet():
                model, tokenizer = read()
        except (UserError, MemoryError):
            raise
        except Exception as error:  # the library raises a dozen unrelated types
            raise UserError(
                f"`model` {name} could not be loaded ({reason_of(error, 300)}): give another "
                "model, or download it again"
            ) from error
    else:
        todo = "check the name, or give a folder with config.json or a .gguf file"
        model, tokenizer = hub_call(read, f"`model` {name}", todo)
    lm = wrap_model(model, tokenizer, resolved.name, blocks_path)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    for parameter in model.parameters():
        if parameter.is_floating_point() and chosen_dtype == torch.float16:
            parameter.data = parameter.data.to(chosen_dtype)
    if not placed:
        model.to(target)
    return lm


@contextlib.contextmanager
def _no_foreign_code(name: str) -> Iterator[None]:
    """The library's refusal to run code of a folder or repository, in our words."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"`model` {name} needs Python code of its own, which is not run: give another model, "
            "or `trust_remote_code` if you have read that code and trust it"
        ) from error


def _check_config(path: str, offline: bool, name: str, trust_remote_code: bool) -> None:
    """Refuse, by its config alone, what is no causal language model or would run foreign code."""
    from transformers import PretrainedConfig

    from saesteer.checkpoints.model_kinds import check_config

    config, _ = PretrainedConfig.get_config_dict(path, local_files_only=offline)
    check_config(config, name)
    if not trust_remote_code:
        _refuse_hub_kernels(config, name)


def _refuse_hub_kernels(config: dict[str, Any], name: str) -> None:
    """Refuse a config that has its attention or experts computed by a repository of the Hub, which
    the library would fetch and run."""

    def foreign(value: Any) -> str | None:
        if isinstance(value, dict):
            for key, inner in value.items():
                named = key.removeprefix("_") in ("attn_implementation", "experts_implementation")
                for wanted in inner.values() if isinstance(inner, dict) else [inner]:
                    if named and isinstance(wanted, str) and "/" in wanted:
                        return wanted
                if found := foreign(inner):
                    return found
        return None

    if found := foreign(config):
        raise UserError(
            f"`model` {name} has its attention computed by code of {found}, which is not fetched: "
            "remove attn_implementation from its config.json, or give `trust_remote_code`"
        )


def _placement(
    device_map: str | None, quantize: str | None, target: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that place or quantise the weights while they are read."""
    if device_map not in (None, "auto"):
        raise UsageError(f"`device_map` must be auto, got {device_map!r}")
    if quantize not in (None, "8bit", "4bit"):
        raise UsageError(f"`quantize` must be 8bit or 4bit, got {quantize!r}")
    if quantize is None:
        return {} if device_map is None else {"device_map": device_map}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"`quantize` {quantize} needs bitsandbytes, which is not installed: "
            "pip install 'saesteer[quant]'"
        )
    from transformers import BitsAndBytesConfig

    wanted = BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_type="nf4",
    )
    return {"device_map": device_map or {"": target}, "quantization_config": wanted}


def as_language_model(
    model: "str | LanguageModel", *, device: str = "auto", dtype: str = "auto"
) -> LanguageModel:
    """Pass a `LanguageModel` through; load anything else by name."""
    if isinstance(model, LanguageModel):
        return model
    return load_model(model, device=device, dtype=dtype)


def _from_pretrained(
    path: str,
    dtype: torch.dtype | str,
    offline: bool,
    placed: dict[str, Any],
    trust_remote_code: bool,
) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    options: dict[str, Any] = {
        "dtype": dtype, "local_files_only": offline, "output_loading_info": True,
        # Never left to the library, which asks on stdout and takes an answer from stdin.
        "trust_remote_code": trust_remote_code, **placed
    }  # fmt: skip
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        # Multimodal wrappers are registered elsewhere; their text tower is used alone.
        model, info = AutoModelForImageTextToText.from_pretrained(path, **options)
    # The library fills what it does not find with random numbers, and only warns.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"`model` {path} lacks {len(missing)} of its weights, first {missing[0]}: give a "
            "complete causal language model"
        )
    return model
