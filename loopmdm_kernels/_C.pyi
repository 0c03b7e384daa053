from torch import Tensor

def cpu_isa() -> str: ...
def usable_cpu_isas() -> str: ...
def thread_runtime() -> str: ...
def debug_parallel(num_threads: int, rounds: int, failing: int = -1) -> list[int]: ...
def debug_share(num_threads: int, num_tasks: int, phases: int) -> list[int]: ...
def cpu_peak_flops(dtype_is_bf16: bool, num_threads: int, milliseconds: float) -> float: ...
def philox(seed: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]: ...
def fingerprint(weight: Tensor, num_threads: int = 1) -> int: ...
def packed_size(columns: int, depth: int, heads: int, parts: int, narrow: bool) -> int: ...
def pack_linear(
    weight: Tensor,
    heads: int,
    parts: int,
    narrow: bool,
    transposed: bool,
    num_threads: int,
    packed: Tensor,
) -> None: ...
def tape_bytes(length: int, hidden: int, width: int, heads: int, narrow: bool) -> int: ...
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
    narrow: bool,
    dropout: float,
    dropout_seed: int,
    first_loop: int,
    exit_threshold: float,
    num_threads: int,
    out: Tensor,
    used: Tensor,
    loop_inputs: Tensor | None,
    tape: Tensor | None,
) -> None: ...
def looped_blocks_backward(
    gradient: Tensor,
    blocks: list[Tensor],
    transposed: list[Tensor],
    modulation: Tensor,
    num_loops: Tensor,
    heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    narrow: bool,
    dropout: float,
    dropout_seed: int,
    first_loop: int,
    num_threads: int,
    tape: Tensor,
    gradients: list[Tensor],
) -> None: ...
def head_logits(
    hidden: Tensor,
    rows: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    narrow: bool,
    num_threads: int,
    logits: Tensor,
) -> None: ...
def sample_rows(
    hidden: Tensor,
    rows: Tensor,
    norm: Tensor,
    shift: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    narrow: bool,
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
    log_sum_exp: Tensor,
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
    excluded_token: int,
    narrow: bool,
    num_threads: int,
    row_weights: Tensor,
    total: Tensor,
    top: Tensor,
    sum: Tensor,
    nll: Tensor,
    tile_top: Tensor | None,
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
    excluded_token: int,
    narrow: bool,
    num_threads: int,
    top: Tensor,
    sum: Tensor,
    nll: Tensor,
    tile_top: Tensor,
    exponentials: Tensor | None,
    nll_grad: Tensor,
    hidden_grad: Tensor | None,
    norm_grad: Tensor | None,
    shift_grad: Tensor | None,
    scale_grad: Tensor | None,
    weight_grad: Tensor | None,
    bias_grad: Tensor | None,
) -> None: ...
