from torch import Tensor

def cpu_isa() -> str: ...
def usable_cpu_isas() -> str: ...
def thread_runtime() -> str: ...
def debug_parallel(num_threads: int, rounds: int, failing: int = -1) -> list[int]: ...
def debug_share(num_threads: int, num_tasks: int, phases: int) -> list[int]: ...
def cpu_peak_flops(dtype_is_bf16: bool, num_threads: int, milliseconds: float) -> float: ...
def philox(seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]: ...
def fingerprint(weight: Tensor, num_threads: int = 1) -> int: ...
def packed_size(columns: int, depth: int, heads: int, parts: int, bf16: bool) -> int: ...
def pack_linear(
    weight: Tensor,
    heads: int,
    parts: int,
    bf16: bool,
    transposed: bool,
    num_threads: int,
    packed: Tensor,
    fresh: bool,
) -> None: ...
def record_bytes(length: int, hidden: int, width: int, heads: int, bf16: bool) -> int: ...
def padded_columns(columns: int) -> int: ...
def looped_blocks(
    x: Tensor,
    blocks: list[Tensor],
    modulation: Tensor,
    num_loops: Tensor,
    heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    bf16: bool,
    dropout: float,
    dropout_seed: int,
    first_loop: int,
    exit_threshold: float,
    num_threads: int,
    out: Tensor,
    used: Tensor,
    loop_inputs: Tensor | None,
    records: Tensor | None,
) -> None: ...
def looped_blocks_backward(
    grad_x: Tensor,
    blocks: list[Tensor],
    transposed: list[Tensor],
    modulation: Tensor,
    num_loops: Tensor,
    heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    bf16: bool,
    dropout: float,
    dropout_seed: int,
    first_loop: int,
    num_threads: int,
    records: Tensor,
    gradients: list[Tensor],
    add: bool,
    nanoseconds: Tensor | None = ...,
) -> None: ...
def quantized_size(vocab_size: int, width: int) -> int: ...
def quantize_head(weight: Tensor, bf16: bool, num_threads: int, quantized: Tensor, fresh: bool) -> None: ...
def sample_tokens(
    hidden: Tensor,
    rows: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized: bool,
    bf16: bool,
    quantized: Tensor,
    excluded_token: int,
    seed: int,
    sequence: Tensor,
    step: Tensor,
    position: Tensor,
    temperature: float,
    num_threads: int,
    token: Tensor,
    finite: Tensor,
) -> None: ...
def head_logits(
    hidden: Tensor,
    rows: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized: bool,
    bf16: bool,
    num_threads: int,
    logits: Tensor,
) -> None: ...
def draw_restricted(
    log_probs: Tensor,
    tempered: Tensor,
    probs: Tensor | None,
    most: int,
    top_p: float,
    seed: int,
    sequence: Tensor,
    step: Tensor,
    position: Tensor,
    temperature: float,
    num_threads: int,
    token: Tensor,
) -> None: ...
def largest_values(values: Tensor, num_threads: int, out: Tensor) -> None: ...
def sample_rows(
    hidden: Tensor,
    rows: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized: bool,
    bf16: bool,
    excluded_token: int,
    seed: int,
    sequence: Tensor,
    step: Tensor,
    position: Tensor,
    temperature: float,
    num_threads: int,
    token: Tensor,
    log_prob: Tensor,
    top1_token: Tensor,
    top1_prob: Tensor,
    top2_prob: Tensor,
    entropy: Tensor,
) -> None: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_threads: int,
    out: Tensor,
    log_sum_exp: Tensor | None,
) -> None: ...
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_threads: int,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None: ...

CROSS_ENTROPY_GROUP_ROWS: int
MOST_QUANTIZED_WIDTH: int

def cross_entropy_tiles(vocab_size: int) -> int: ...
def masked_cross_entropy(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized: bool,
    excluded_token: int,
    bf16: bool,
    num_threads: int,
    row_weights: Tensor,
    total: Tensor,
    largest: Tensor,
    sum: Tensor,
    nll: Tensor,
    tile_largest: Tensor | None,
    exponentials: Tensor | None,
) -> None: ...
def masked_cross_entropy_backward(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized: bool,
    excluded_token: int,
    bf16: bool,
    num_threads: int,
    largest: Tensor,
    sum: Tensor,
    nll: Tensor,
    tile_largest: Tensor,
    exponentials: Tensor | None,
    grad_nll: Tensor,
    grad_hidden: Tensor | None,
    grad_norm: Tensor | None,
    grad_shift: Tensor | None,
    grad_scale: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None: ...
def head_logits_backward(
    hidden: Tensor,
    rows: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized: bool,
    bf16: bool,
    num_threads: int,
    grad_logits: Tensor,
    grad_hidden: Tensor | None,
    grad_norm: Tensor | None,
    grad_shift: Tensor | None,
    grad_scale: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None: ...

class PreparedNetwork:
    def __init__(
        self,
        embedding: Tensor,
        positions: Tensor | None,
        blocks: tuple[Tensor, ...],
        modulation: Tensor,
        num_before: int,
        num_after: int,
        heads: int,
        cos: Tensor | None,
        sin: Tensor | None,
        head: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool],
        excluded_token: int,
        quantized: Tensor | None,
    ) -> None: ...

class DecodingRun:
    def __init__(
        self,
        network: PreparedNetwork,
        slots: tuple[Tensor, ...],
        schedule: tuple[Tensor, Tensor] | None,
        place: Tensor | None,
        pace: tuple[str, str, float | None, float, int],
        computes: tuple[Tensor, ...],
        max_batch: int,
        seed: int,
        temperature: float,
        state: tuple[Tensor, ...],
    ) -> None: ...
    def take_steps(
        self, first: int, most: int, milliseconds: float, num_threads: int
    ) -> tuple[int, int, int, int, int, int, int]: ...
