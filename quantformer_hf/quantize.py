"""From a full-precision backbone to a quantized one, and from stage to stage."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .attention import AttentionOperands, RowQuantizer, attention_modules
from .class_token import CLASS_TOKENS, ClassTokenQuantizer
from .configuration_quantformer import MAX_GROUPS, QuantformerConfig
from .folding import centre_site, folding_sites
from .grids import FULL_PRECISION_BITS
from .groups import channel_importance
from .image_batches import Batches, pixel_values_in
from .layer_bits import CLASSIFIERS, LayerBits, attention_bits_by_name, resolve_layer_bits
from .layers import InferenceLayerNorm, InferenceMean, QuantConv2d, QuantLayerNorm, QuantLinear, quantize_first_argument
from .ops import PRODUCERS
from .packed_forms import choose_forms
from .packed_layers import PackedLinear, packed_form
from .paused import Place
from .progress import progress
from .quantizers import ActivationQuantizer, GroupActivationQuantizer, WeightQuantizer, build_weight_quantizer


def quantize_model(backbone: nn.Module, config: QuantformerConfig) -> None:
    """Replace, in place, what `config` quantizes in a `vit`, `deit` or `swin` image classifier.

    The quantizers have the tensors of `config.stage`. Their values are to be calibrated or loaded.

    Raises:
        ValueError: `num_groups` above the channel count of some layer, or different activation bits for layers that
            read the same tensor.
    """
    bits = resolve_layer_bits(backbone, config)

    def group_quantizer(name: str, producer: str = "identity") -> GroupActivationQuantizer | None:
        width = bits[name].activation_bits
        if width == FULL_PRECISION_BITS:
            return None
        quantizer = GroupActivationQuantizer(
            backbone.get_submodule(name).in_features,
            width,
            name,
            config.calibrated,
            producer,
            config.stage,
            config.num_groups,
            config.whole_multiples,
            has_twin_levels(config),
        )
        if config.class_token_bits is not None:
            ClassTokenQuantizer(quantizer, config.class_token_bits, CLASS_TOKENS[backbone.config.model_type])
        return quantizer

    shared_inputs = find_shared_inputs(backbone)
    producers = {}
    for producer, consumers in shared_inputs.items():
        if len({bits[name].activation_bits for name in consumers}) > 1:
            raise ValueError(
                f"{', '.join(f'{name!r}' for name in consumers)} read the same tensor, which is quantized once: give them"
                f" the same activation_bits in layer_bits"
            )
        producers[producer] = group_quantizer(consumers[0])

    shared = {name for consumers in shared_inputs.values() for name in consumers}
    for name, width in bits.items():
        module = backbone.get_submodule(name)
        in_block = isinstance(module, nn.Linear) and name not in CLASSIFIERS
        weight_quantizer = make_weight_quantizer(name, module, width, config)
        input_quantizer = None
        if in_block and name not in shared:
            input_quantizer = group_quantizer(name, _absorb_producer(backbone, name, width))
        elif not in_block and width.activation_bits != FULL_PRECISION_BITS:
            # Images are data, whose range no training moves: their quantizer stays as calibrated. Its gradient would
            # cost a transposed convolution a step.
            learned = not isinstance(module, nn.Conv2d)
            input_quantizer = ActivationQuantizer(width.activation_bits, name, config.calibrated, learned=learned)
        if weight_quantizer is not None or input_quantizer is not None:
            kind = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
            layer = kind.from_float(module, weight_quantizer, input_quantizer)
            packs = config.stage == "packed" and weight_quantizer is not None
            backbone.set_submodule(name, packed_form(layer) if packs else layer)

    for producer, quantizer in producers.items():
        if quantizer is None:
            continue
        module = backbone.get_submodule(producer)
        if isinstance(module, nn.LayerNorm):
            backbone.set_submodule(producer, QuantLayerNorm.from_float(module, quantizer))
        else:
            module.input_quantizer, module.gives_codes = quantizer, False
            module.register_forward_pre_hook(quantize_first_argument)
    for name, module in list(backbone.named_modules()):
        if type(module) is nn.LayerNorm:
            backbone.set_submodule(name, InferenceLayerNorm.from_float(module))
        elif type(module) is nn.AdaptiveAvgPool1d:
            backbone.set_submodule(name, InferenceMean())

    names = {module: name for name, module in backbone.named_modules()}
    attention = {names[module]: module for module in attention_modules(backbone)}
    for name, bits in attention_bits_by_name(attention, config).items():
        if bits != FULL_PRECISION_BITS:
            width = attention[name].num_attention_heads * attention[name].head_dim
            attention[name].operands = AttentionOperands(bits, name, config.calibrated, width)
    check_num_groups(backbone, config.num_groups)
    connect_readers(backbone, packed=config.stage == "packed")


def connect_readers(backbone: nn.Module, packed: bool) -> None:
    """Tell each layer what quantizes the tensor that it reads, each producer whether its readers take codes, and
    quantizers, LayerNorms and means whether they are part of a packed model."""
    for quantizer in activation_quantizers(backbone):
        quantizer.packed = packed
    for module in backbone.modules():
        if isinstance(module, ActivationQuantizer | AttentionOperands):
            module.forget_plans()
        if isinstance(module, InferenceLayerNorm | InferenceMean):
            module.packed = packed
    readers = reading_layers(backbone)
    for quantizer, layers in readers.items():
        for layer in layers:
            if isinstance(layer, QuantLinear) and layer.input_quantizer is None:
                layer.shared_quantizer = (quantizer,)
    for producer in find_shared_inputs(backbone):
        module = backbone.get_submodule(producer)
        quantizer = _shared_quantizer(module)
        if quantizer is not None:
            module.gives_codes = all(isinstance(layer, PackedLinear) for layer in readers[quantizer])
    choose_forms(backbone, packed)


def find_shared_inputs(backbone: nn.Module) -> dict[str, list[str]]:
    """The modules whose output (LayerNorm) or input (attention block) is quantized once for several readers.

    Swin pads between the LayerNorm and the attention block, and zero need not be on the grid: there the attention block
    quantizes what it is given.

    Returns:
        names of the linears that read the tensor, by the name of the module that quantizes it.
    """
    shared = {}
    for name, module in backbone.named_modules():
        if hasattr(module, "layernorm_before"):
            pads = hasattr(module, "maybe_pad")
            producer = f"{name}.attention" if pads else f"{name}.layernorm_before"
            shared[producer] = [f"{name}.attention.{letter}_proj" for letter in "qkv"]
            shared[f"{name}.layernorm_after"] = [f"{name}.mlp.fc1"]
        elif hasattr(module, "reduction"):
            shared[f"{name}.norm"] = [f"{name}.reduction"]
    return shared


def _absorb_producer(backbone: nn.Module, name: str, width: LayerBits) -> str:
    """Let the quantizer of fc2's input run the GELU before it, which saves a tensor."""
    parent = backbone.get_submodule(name.rpartition(".")[0])
    if width.activation_bits == FULL_PRECISION_BITS or not name.endswith("mlp.fc2"):
        return "identity"
    if backbone.config.hidden_act not in PRODUCERS:
        return "identity"
    parent.activation_fn = nn.Identity()
    return backbone.config.hidden_act


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """Every activation quantizer of the model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]


def searched_quantizers(model: nn.Module) -> list[GroupActivationQuantizer]:
    """Those with an assignment of their own, in order: class tokens take over that of the other tokens."""
    return [quantizer for quantizer in group_quantizers(model) if not isinstance(quantizer, ClassTokenQuantizer)]


def group_quantizers(model: nn.Module) -> list[GroupActivationQuantizer]:
    """The activation quantizers whose channels are grouped."""
    return [module for module in model.modules() if isinstance(module, GroupActivationQuantizer)]


def widest_inputs(model: nn.Module) -> int:
    """The most bits of what any linear of the blocks reads quantized, a class token with bits of its own aside."""
    bits = [quantizer.grid.bits for quantizer in searched_quantizers(model)]
    return max(bits, default=FULL_PRECISION_BITS)


def weight_quantized_layers(model: nn.Module) -> list[QuantLinear | QuantConv2d]:
    """The layers whose weight is quantized."""
    return [
        module
        for module in model.modules()
        if isinstance(module, QuantLinear | QuantConv2d) and module.weight_quantizer is not None
    ]


def bit_widths(model: nn.Module) -> dict[str, int]:
    """The bit width of each quantizer, by its name in `model`."""
    return {
        name: module.grid.bits
        for name, module in model.named_modules()
        if isinstance(module, WeightQuantizer | ActivationQuantizer | RowQuantizer)
    }


def blocks(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks and Swin's patch mergings, each one's output the next one's input."""
    return [m for m in model.modules() if hasattr(m, "layernorm_before") or hasattr(m, "reduction")]


def classifiers(model: nn.Module) -> list[nn.Linear]:
    """What gives the logits, and beside a distillation token two whose mean they are."""
    named = ((name.rpartition(".")[2], module) for name, module in model.named_modules())
    return [module for name, module in named if name in CLASSIFIERS and isinstance(module, nn.Linear)]


def reading_layers(model: nn.Module) -> dict[GroupActivationQuantizer, list[nn.Linear]]:
    """The linears that read what each group quantizer puts out."""
    readers = {}
    for producer, names in find_shared_inputs(model).items():
        quantizer = _shared_quantizer(model.get_submodule(producer))
        if quantizer is not None:
            readers[quantizer] = [model.get_submodule(name) for name in names]
    for module in model.modules():
        if isinstance(module, QuantLinear) and isinstance(module.input_quantizer, GroupActivationQuantizer):
            readers[module.input_quantizer] = [module]
    return readers


def writing_streams(model: nn.Module) -> dict[GroupActivationQuantizer, tuple[Place, Place]]:
    """Where the residual stream is seen before and after what reads a quantizer writes to it (`reconstruction.Streams`).

    Swin's output projection is not among them: its rows are in the order of windows.
    """
    streams = {}
    for block in blocks(model):
        if hasattr(block, "mlp"):
            streams[block.mlp.fc2] = Place(block.layernorm_after), Place(block, output=True)
            if not hasattr(block, "maybe_pad"):
                streams[block.attention.o_proj] = Place(block), Place(block.layernorm_after)
    return {quantizer: streams[layer] for quantizer, (layer, *_) in reading_layers(model).items() if layer in streams}


def _shared_quantizer(producer: nn.Module) -> GroupActivationQuantizer | None:
    return getattr(producer, "output_quantizer", None) or getattr(producer, "input_quantizer", None)


def check_num_groups(model: nn.Module, num_groups: int) -> None:
    """Raise ValueError for what is no number of groups, or where a layer has fewer channels than that."""
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or not 1 <= num_groups <= MAX_GROUPS:
        raise ValueError(f"num_groups is {num_groups!r}: choose an int from 1 to {MAX_GROUPS}")
    for quantizer in group_quantizers(model):
        if num_groups > quantizer.channels:
            raise ValueError(
                f"num_groups is {num_groups}, but layer '{quantizer.name}' has only {quantizer.channels} channels:"
                f" choose at most that"
            )


def check_group_indices(model: nn.Module, source: str) -> None:
    """Raise ValueError where a loaded channel belongs to a group that there is not."""
    for quantizer in group_quantizers(model):
        index = getattr(quantizer, "group_index", None)
        if index is not None and index.max() >= quantizer.scale.numel():
            raise ValueError(
                f"layer '{quantizer.name}' of the checkpoint '{source}' has a channel in group {index.max().item()}, and"
                f" only {quantizer.scale.numel()} groups: get the file again from where it was written"
            )


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Run the model with all quantizers off inside the `with` block."""
    quantizers = [module for module in model.modules() if isinstance(module, WeightQuantizer | ActivationQuantizer)]
    before = [quantizer.enabled for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(quantizers, before, strict=True):
            quantizer.enabled = enabled


@torch.no_grad()
def observe(
    model: nn.Module, batches: Batches, quantizers: list[ActivationQuantizer]
) -> dict[ActivationQuantizer, Tensor]:
    """Show `batches` to the model and return the quantiles `(channels, quantiles)` that each quantizer saw.

    Raises:
        TypeError, ValueError: as `pixel_values_in`.
        RuntimeError: a layer that no batch reached, or that saw something that is not finite.
    """
    training = model.training
    model.eval()
    for quantizer in quantizers:
        quantizer.observer = quantizer.make_observer()
    device = next(model.parameters()).device
    try:
        for pixel_values in progress(pixel_values_in(batches), "Calibrating, batches"):
            model(pixel_values.to(device))
        seen = {}
        for quantizer in quantizers:
            try:
                seen[quantizer] = quantizer.observer.quantiles()
            except RuntimeError as error:
                raise RuntimeError(
                    f"layer '{quantizer.name}' cannot be calibrated: {error}. Give batches of images that run through the"
                    f" whole model"
                ) from error
        return seen
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
        model.train(training)


def calibrate(model: nn.Module, batches: Batches, centre_channels: bool = True) -> None:
    """Set every scale and offset from data, as the full-precision model sees it; weights from themselves."""
    with full_precision(model):
        seen = observe(model, batches, activation_quantizers(model))
    for site in folding_sites(model, reading_layers(model)) if centre_channels else ():
        shift = centre_site(site, seen[site.quantizer]).unsqueeze(1)
        for quantizer in (*site.quantizer.with_class_token(), *site.beside):
            seen[quantizer] = seen[quantizer] - shift
    for quantizer, quantiles in seen.items():
        quantizer.calibrate(quantiles)
    for layer in weight_quantized_layers(model):
        layer.weight_quantizer.calibrate(layer.weight)


def begin_search(model: nn.Module, num_groups: int, batches: Batches | None = None, twin_levels: bool = False) -> None:
    """Split the channels of each block linear's input into groups, softly."""
    check_num_groups(model, num_groups)
    if batches is not None:
        for quantizer, quantiles in observe(model, batches, group_quantizers(model)).items():
            quantizer.channel_quantiles.copy_(quantiles)
    for quantizer, layers in reading_layers(model).items():
        for part in quantizer.with_class_token():
            part.begin_search(num_groups, channel_importance(layers), twin_levels)


def has_twin_levels(config: QuantformerConfig) -> bool:
    """Whether quantizers of GELU's output have levels of two step sizes now."""
    return bool(config.twin_levels) and config.stage != "pretrain"


def follow_groups(model: nn.Module, saved: QuantformerConfig) -> None:
    """Have groups lie as in the model of `saved`: their stage, their levels, and whether scales are multiples."""
    for quantizer in group_quantizers(model):
        if quantizer.stage != saved.stage:
            quantizer.set_stage(saved.stage, saved.num_groups)
        quantizer.set_levels(has_twin_levels(saved))
    for quantizer in searched_quantizers(model):
        quantizer.whole_multiples = saved.whole_multiples


def freeze_groups(model: nn.Module) -> None:
    """Give each channel to its most probable group."""
    for quantizer in group_quantizers(model):
        quantizer.freeze_groups()


def make_weight_quantizer(
    name: str, layer: nn.Module, width: LayerBits, config: QuantformerConfig
) -> WeightQuantizer | None:
    """The quantizer of one layer's weight: patch embedding and classifier always learn their scales."""
    if width.weight_bits == FULL_PRECISION_BITS:
        return None
    in_block = isinstance(layer, nn.Linear) and name not in CLASSIFIERS
    out_channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return build_weight_quantizer(config.weight_quantizer if in_block else "lsq", width.weight_bits, out_channels)
