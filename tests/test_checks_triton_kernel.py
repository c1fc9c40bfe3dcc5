"""The checks of chapter 9 name each mistake. A mistake is one changed line of a right kernel."""

import inspect
import textwrap

import pytest

from modernbert_mini import checks
from modernbert_mini.triton_kernel import tl

LOG2_E = 1.4426950408889634

# ---- right answers ----


def add(x, y, out, n, BLOCK):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    one = tl.load(x + places, mask=inside)
    two = tl.load(y + places, mask=inside)
    tl.store(out + places, one + two, mask=inside)


def geglu(x, out, x_row, out_row, I, BLOCK):  # noqa: E741
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < I
    signal = tl.load(x + token * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + token * x_row + I + columns, mask=inside, other=0.0).to(tl.float32)
    active = 0.5 * signal * (1 + tl.erf(signal * 0.7071067811865476))
    tl.store(out + token * out_row + columns, active * gate, mask=inside)


def tile(acc, total, top, q, keys, values, seen, scale):
    scores = tl.dot(q, tl.trans(keys)) * scale
    scores = tl.where(seen, scores, -1e30)
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - higher)
    powers = tl.exp2(scores - higher[:, None])
    acc = acc * shrink[:, None] + tl.dot(powers.to(values.dtype), values)
    total = total * shrink + tl.sum(powers, 1)
    return acc, total, higher


def value_gradient(q, k, grad, lse, dv, n, D, OWN, OTHER):
    columns = tl.arange(0, D)
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    keys = tl.load(k + own[:, None] * D + columns[None, :], mask=(own < n)[:, None], other=0.0)
    acc = tl.zeros((OWN, D), tl.float32)
    for begin in range(0, n, OTHER):
        rows = begin + tl.arange(0, OTHER)
        places = rows[:, None] * D + columns[None, :]
        queries = tl.load(q + places, mask=(rows < n)[:, None], other=0.0)
        grads = tl.load(grad + places, mask=(rows < n)[:, None], other=0.0)
        sums = tl.load(lse + rows, mask=rows < n, other=0.0)
        scores = tl.dot(keys, tl.trans(queries)) * (D**-0.5 * LOG2_E)
        weights = tl.exp2(scores - sums[None, :])
        acc += tl.dot(weights, grads)
    tl.store(dv + own[:, None] * D + columns[None, :], acc, mask=(own < n)[:, None])


def in_mini(q, k, v, out, head, row, cu_seqlens, max_seqlen, HALF_WINDOW, D, OWN, OTHER):
    tiles = tl.cdiv(max_seqlen, OWN)
    sequence = tl.program_id(0) // tiles
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    first = tl.program_id(0) % tiles * OWN
    if first >= length:
        return
    base = tl.program_id(1) * head + start * row
    rows = first + tl.arange(0, OWN)
    columns = tl.arange(0, D)
    here = base + rows[:, None] * row + columns[None, :]
    queries = tl.load(q + here, mask=(rows < length)[:, None], other=0.0)
    acc = tl.zeros((OWN, D), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    top = tl.full((OWN,), -float("inf"), tl.float32)
    low, high = 0, length
    if HALF_WINDOW is not None:
        low = tl.maximum(first - HALF_WINDOW, 0)
        high = tl.minimum(first + OWN + HALF_WINDOW, length)
    for begin in range(low, high, OTHER):
        others = begin + tl.arange(0, OTHER)
        there = base + others[:, None] * row + columns[None, :]
        keys = tl.load(k + there, mask=(others < length)[:, None], other=0.0)
        values = tl.load(v + there, mask=(others < length)[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * (D**-0.5 * LOG2_E)
        seen = (others < length)[None, :]
        if HALF_WINDOW is not None:
            seen = seen & (tl.abs(rows[:, None] - others[None, :]) <= HALF_WINDOW)
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        powers = tl.exp2(scores - higher[:, None])
        acc = acc * shrink[:, None] + tl.dot(powers.to(values.dtype), values)
        total = total * shrink + tl.sum(powers, 1)
        top = higher
    tl.store(out + here, acc / total[:, None], mask=(rows < length)[:, None])


SOLUTIONS = {f.__name__: f for f in (add, geglu, tile, value_gradient, in_mini)}

# ---- mistakes: a line, what it becomes, and a word of the hint ----

MASK = ", mask=inside"
MISTAKES = {
    "add": [
        ("tl.program_id(0) * BLOCK", "0", "starts at number 0"),
        ("tl.program_id(0) * BLOCK", "tl.program_id(0)", "starts at number 1"),
        ("one + two, mask=inside", "one + two", "numbers 10 and 11"),
        ("places < n", "places <= n", "number `n` still inside"),
        ("x + places, mask=inside", "x + places", "The store has a mask, and the load"),
        ("one + two", "one", "Where is `y`"),
        ("one + two", "one - two", "Plus or minus"),
        ("one + two", "one * two", "Plus or times"),
        ("y + places", "x + places", "through the pointer `y`"),
        ("    tl.store", "    _ = x  # tl.store", "write anything"),
        ("places < n", "places < 10", "a size written"),
    ],
    "geglu": [
        ("active * gate",
         "signal * 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))", "*first*"),
        ("x_row + I + columns", "x_row + BLOCK + columns", "not behind BLOCK"),
        ("token * x_row", "token * I", "from one row of `x` to the next"),
        ("active * gate", "active", "Where is the gate"),
        ("active * gate", "signal * gate", "Where is GELU"),
        ("active = 0.5 * signal * (1 + tl.erf(signal * 0.7071067811865476))",
         "active = signal / (1 + tl.exp(-signal))", "is SiLU"),
        ("active = 0.5 * signal * (1 + tl.erf(signal * 0.7071067811865476))",
         "active = signal / (1 + tl.exp(-1.702 * signal))", "by a sigmoid"),
        ("0.5 * signal", "signal", "factor of 0.5"),
        ("tl.erf(signal * 0.7071067811865476)", "tl.erf(signal)", "root is missing"),
        ("active * gate, mask=inside", "active * gate", "writes into the next row"),
        ("token * out_row", "0", "Which row is whose"),
        ("token * x_row", "token * 2 * I", "further apart"),
        (".to(tl.float32)", "", "in float16"),
        ("columns, mask=inside, other=0.0", "columns", "stay in its row"),
    ],
    "tile": [
        ("return acc, total, higher", "return acc, total, tl.max(scores, 1)", "old maximum lost"),
        ("return acc, total, higher", "return acc, total, top", "ever move"),
        ("tl.max(scores, 1)", "scores.max()", "Whose maximum"),
        (" * scale", "", "Where is `scale`"),
        ("tl.trans(keys)", "keys", "Rows times rows"),
        ("total * shrink", "total", "old sum relative"),
        ("exp2(", "exp(", "Base 2 or base e"),
        ("total = total * shrink + tl", "total = tl", "Where is the old sum"),
        ("tl.exp2(top - higher)", "tl.exp2(higher - top)", "Which way round"),
        ("acc = acc * shrink[:, None]", "acc = acc", "accumulator rescaled"),
        ("return acc, total", "return acc / total[:, None], total", "divides once"),
        ("acc = acc * shrink[:, None] +", "acc =", "old accumulator"),
        ("    scores = tl.where", "    _ = tl.where", "What does `seen` do"),
        ("-1e30", '-float("inf")', "seen nothing so far"),
        ("-1e30", "0.0", "hidden keys still weigh"),
        ("powers.to(values.dtype)", "powers", "multiplies what is alike"),
        ("return acc, total, higher", "return acc, total", "three things"),
    ],
    "value_gradient": [
        ("exp2(", "tl.exp(".removeprefix("tl."), "Base 2 or base e"),
        (" * LOG2_E", "", "in the same base"),
        ("D**-0.5 * LOG2_E", "LOG2_E", "Where is the scale"),
        (" - sums[None, :]", "", "Where is `lse`"),
        ("acc += tl", "acc = tl", "last one only"),
        ("range(0, n, OTHER)", "range(0, OTHER, OTHER)", "first one only"),
        ("range(0, n, OTHER)", "range(0, n // OTHER * OTHER, OTHER)", "last full tile"),
        ("scores - sums[None, :]", "tl.trans(scores) - sums[:, None]", "Which way does"),
        ("mask=rows < n, other=0.0", "mask=rows < n", "without `other`"),
        (", acc, mask=(own < n)[:, None])", ", acc)", "store's mask"),
        ("grad + places, mask=(rows < n)[:, None], other=0.0", "grad + places", "Mask every load"),
        ("    tl.store", "    _ = n  # tl.store", "write anything"),
        ("tl.store(dv + own[:, None]", "tl.store(dv + tl.arange(0, OWN)[:, None]", "Who owns"),
    ],
    "in_mini": [
        ("D**-0.5 * LOG2_E", "LOG2_E", "Where is the scale"),
        ("D**-0.5 * LOG2_E", "D**-0.5 * LOG2_E * LOG2_E", "With log2(e) in the scores"),
        (" * LOG2_E", "", "wants log2(e) in the scores, and"),
        ("acc = acc * shrink[:, None]", "acc = acc", "Compare your inner loop"),
        ("seen = (others < length)[None, :]", "seen = (others > -1)[None, :]", "wrong for 75"),
        ("start = tl.load(cu_seqlens + sequence)", "start = sequence * max_seqlen",
         "Right for one text"),
        ("tl.program_id(1) * head", "0", "Whose head"),
        ("high = tl.minimum(first + OWN", "high = tl.minimum(first", "its *last* row"),
        ("<= HALF_WINDOW", "< HALF_WINDOW", "ends inside"),
        ("<= HALF_WINDOW", "<= HALF_WINDOW // 2", "*half* window"),
        ("<= HALF_WINDOW", "<= 999", "Where is the window"),
        ("-1e30", '-float("inf")', "not with -inf"),
        ("low = tl.maximum(first - HALF_WINDOW, 0)", "low = 0", "skip tiles"),
        ("mask=(rows < length)[:, None])", "mask=(rows < 999)[:, None])", "last tile of queries"),
        ("mask=(rows < length)[:, None])",
         "mask=(start + rows < tl.load(cu_seqlens + tl.num_programs(0) // tiles))[:, None])",
         "stops at the end"),
    ],
}  # fmt: skip
CASES = [(name, *mistake) for name, all_of in MISTAKES.items() for mistake in all_of]


def planted(name, old, new):
    """The right kernel, with every `old` in it replaced."""
    source = textwrap.dedent(inspect.getsource(SOLUTIONS[name]))
    assert old in source, f"{old!r} is not in {name}"
    made = {}
    exec(source.replace(old, new), globals(), made)
    return made[name]


def check(name):
    return getattr(checks.triton_kernel, name)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_right_answer_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result.passed, result.message
    assert result.message


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_stub_is_no_failure(name):
    def stub(*args, **sizes):
        raise NotImplementedError

    result = check(name)(stub)
    assert not result.passed and "Not written yet" in result.message


@pytest.mark.parametrize(
    ("name", "old", "new", "said"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES]
)
def test_a_mistake_is_named(name, old, new, said):
    result = check(name)(planted(name, old, new))
    assert not result.passed
    assert said in result.message, result.message


def test_each_mistake_has_a_hint_of_its_own():
    for name, all_of in MISTAKES.items():
        said = [check(name)(planted(name, old, new)).message for old, new, _ in all_of]
        assert len(set(said)) == len(said), name
