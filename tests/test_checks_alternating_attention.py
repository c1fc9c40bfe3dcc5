"""Each exercise of chapter 6: the solution passes, and each mistake gets its own hint."""

import pytest
import torch

from modernbert_mini import alternating_attention, checks

GLOBAL, LOCAL = "full_attention", "sliding_attention"


# ---- layer_pattern ----


def kinds(num_layers, is_global):
    return [GLOBAL if is_global(i) else LOCAL for i in range(num_layers)]


def kinds_swapped(num_layers, every_n):
    return kinds(num_layers, lambda i: i % every_n)


def ends_each_group(num_layers, every_n):
    return kinds(num_layers, lambda i: (i + 1) % every_n == 0)


def counts_from_one(num_layers, every_n):
    return kinds(num_layers, lambda i: i % every_n == 1)


def first_group_only(num_layers, every_n):
    return kinds(num_layers, lambda i: i == 0)


def forced_end(num_layers, every_n):
    return kinds(num_layers, lambda i: i % every_n == 0 or i == num_layers - 1)


def n_local_ones(num_layers, every_n):
    return kinds(num_layers, lambda i: i % (every_n + 1) == 0)


def always_three(num_layers, every_n):
    return kinds(num_layers, lambda i: i % 3 == 0)


def one_layer_short(num_layers, every_n):
    return kinds(num_layers - 1, lambda i: i % every_n == 0)


def own_names(num_layers, every_n):
    return ["local" if i % every_n else "global" for i in range(num_layers)]


def numbers(num_layers, every_n):
    return torch.arange(num_layers) % every_n == 0


def at_least_one_local(num_layers, every_n):
    return kinds(num_layers, lambda i: i % max(every_n, 2) == 0)


def first_two(num_layers, every_n):
    return kinds(num_layers, lambda i: i < 2)


# ---- window_mask ----


def distance(length):
    position = torch.arange(length)
    return position[None, :] - position[:, None]


def window(seen):
    """A mask from a rule for the signed distance of a key, key minus query."""

    def mask(length, half_window):
        return seen(distance(length), half_window)

    return mask


def inverted(length, half_window):
    return distance(length).abs() > half_window


def open_ends(length, half_window):
    return distance(length).abs() < half_window


def half_open(length, half_window):
    d = distance(length)
    return (d >= -half_window) & (d < half_window)


def half_open_left(length, half_window):
    d = distance(length)
    return (d > -half_window) & (d <= half_window)


def past_only(length, half_window):
    d = distance(length)
    return (d <= 0) & (d >= -half_window)


def future_only(length, half_window):
    d = distance(length)
    return (d >= 0) & (d <= half_window)


def no_abs(length, half_window):
    return distance(length) <= half_window


def no_abs_right(length, half_window):
    return distance(length) >= -half_window


def halved(length, half_window):
    return distance(length).abs() <= half_window // 2


def doubled(length, half_window):
    return distance(length).abs() <= 2 * half_window


def blind_to_itself(length, half_window):
    d = distance(length)
    return (d.abs() <= half_window) & (d != 0)


def ring(length, half_window):
    d = distance(length).abs()
    return torch.minimum(d, length - d) <= half_window


def cut_into_blocks(length, half_window):
    block = torch.arange(length) // (2 * half_window + 1)
    return block[:, None] == block[None, :]


def as_numbers(length, half_window):
    return (distance(length).abs() <= half_window).float()


def to_be_added(length, half_window):
    outside = distance(length).abs() > half_window
    return torch.zeros(length, length).masked_fill(outside, -torch.inf)


def written_width(length, half_window):
    return distance(length).abs() <= 3


def one_row(length, half_window):
    return torch.arange(length) <= half_window


def nothing(length, half_window):
    return torch.zeros(length, length, dtype=torch.bool)


# ---- reach ----


def reach(layer_types, half_window, length, position):
    if GLOBAL in layer_types:
        return length
    side = half_window * len(layer_types)
    return min(length - 1, position + side) - max(0, position - side) + 1


def one_window(layer_types, half_window, length, position):
    return reach(layer_types[-1:], half_window, length, position)


def one_side(layer_types, half_window, length, position):
    return len(layer_types) * half_window + 1


def one_side_without_itself(layer_types, half_window, length, position):
    return len(layer_types) * half_window


def without_itself(layer_types, half_window, length, position):
    return reach(layer_types, half_window, length, position) - 1


def itself_in_every_layer(layer_types, half_window, length, position):
    return len(layer_types) * (2 * half_window + 1)


def multiplied(layer_types, half_window, length, position):
    return (2 * half_window + 1) ** len(layer_types)


def first_layer_forgotten(layer_types, half_window, length, position):
    return reach(layer_types[1:], half_window, length, position)


def one_layer_more(layer_types, half_window, length, position):
    return reach([LOCAL, *layer_types], half_window, length, position)


def never_cut(layer_types, half_window, length, position):
    return length if GLOBAL in layer_types else 2 * half_window * len(layer_types) + 1


def cut_on_the_left(layer_types, half_window, length, position):
    side = half_window * len(layer_types)
    return length if GLOBAL in layer_types else side + min(side, position) + 1


def longer_than_the_text(layer_types, half_window, length, position):
    found = reach(layer_types, half_window, length, position)
    return found if half_window < length / 2 else 2 * half_window * len(layer_types) + 1


def global_ignored(layer_types, half_window, length, position):
    return reach([LOCAL] * len(layer_types), half_window, length, position)


def only_layer_0_opens(layer_types, half_window, length, position):
    if layer_types[0] == GLOBAL:
        return length
    return reach([LOCAL] * len(layer_types), half_window, length, position)


def all_taken_as_global(layer_types, half_window, length, position):
    return length


def a_fraction(layer_types, half_window, length, position):
    return reach(layer_types, half_window, length, position) / 1


# ---- packed_mask ----


def documents(cu_seqlens):
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def packed(document, half_window):
    inside = document[:, None] == document[None, :]
    return inside if half_window is None else inside & window_of(len(document), half_window)


def window_of(length, half_window):
    return distance(length).abs() <= half_window


def window_only(cu_seqlens, half_window):
    return window_of(int(cu_seqlens[-1]), half_window)


def documents_only(cu_seqlens, half_window):
    return packed(documents(cu_seqlens), None)


def places_only(cu_seqlens, half_window):
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    place = torch.arange(len(starts)) - starts
    return (place[:, None] - place[None, :]).abs() <= half_window


def boundary_late(cu_seqlens, half_window):
    place = torch.arange(int(cu_seqlens[-1]))
    return packed(torch.searchsorted(cu_seqlens, place).clamp_min(1), half_window)


def boundary_early(cu_seqlens, half_window):
    place = torch.arange(int(cu_seqlens[-1]))
    document = torch.searchsorted(cu_seqlens[:-1], place + 1, right=True)
    return packed(document, half_window)


def causal(cu_seqlens, half_window):
    mask = packed(documents(cu_seqlens), half_window)
    return mask & (distance(len(mask)) <= 0)


def open_window(cu_seqlens, half_window):
    return packed(documents(cu_seqlens), half_window - 1)


def either(cu_seqlens, half_window):
    document = documents(cu_seqlens)
    return packed(document, None) | window_of(len(document), half_window)


def hidden_instead(cu_seqlens, half_window):
    return ~packed(documents(cu_seqlens), half_window)


def stops_at_none(cu_seqlens, half_window):
    document = documents(cu_seqlens)
    return packed(document, None) & window_of(len(document), half_window)


def global_sees_all(cu_seqlens, half_window):
    if half_window is None:
        return torch.ones(int(cu_seqlens[-1]), int(cu_seqlens[-1]), dtype=torch.bool)
    return packed(documents(cu_seqlens), half_window)


def three_documents(cu_seqlens, half_window):
    place = torch.arange(int(cu_seqlens[-1]))
    return packed((place >= cu_seqlens[1]).int() + (place >= cu_seqlens[2]), half_window)


def per_document(cu_seqlens, half_window):
    longest = int(cu_seqlens.diff().max())
    return window_of(longest, half_window).expand(len(cu_seqlens) - 1, -1, -1)


def rewrites_bounds(cu_seqlens, half_window):
    document = documents(cu_seqlens)
    cu_seqlens -= 1
    return packed(document, half_window)


def sees_itself_alone(cu_seqlens, half_window):
    return torch.eye(int(cu_seqlens[-1]), dtype=torch.bool)


# ---- near_keys ----


def padded(k, size):
    fill = -k.shape[1] % size
    return torch.nn.functional.pad(k, (0, 0, size, size + fill))


def near_keys(k, size):
    return padded(k, size).unfold(1, 3 * size, size).transpose(-1, -2)


def near_keys_copied(k, size):
    wide = padded(k, size)
    blocks = wide.shape[1] // size - 2
    return torch.stack([wide[:, b * size : (b + 3) * size] for b in range(blocks)], dim=1)


def window_last(k, size):
    return padded(k, size).unfold(1, 3 * size, size)


def blocks_first(k, size):
    return near_keys(k, size).transpose(0, 1)


def two_blocks(k, size):
    return near_keys(k, size)[:, :, : 2 * size]


def no_overlap(k, size):
    return k.unfold(1, 3 * size, 3 * size).transpose(-1, -2)


def no_fill_at_all(k, size):
    return k.unfold(1, 2 * size, size).transpose(-1, -2)


def goes_round(k, size):
    wide = torch.cat((k[:, -size:], k, k[:, :size]), dim=1)
    return wide.unfold(1, 3 * size, size).transpose(-1, -2)


def own_block_first(k, size):
    before, own, after = near_keys(k, size).split(size, dim=2)
    return torch.cat((own, before, after), dim=2)


def backwards(k, size):
    before, own, after = near_keys(k, size).split(size, dim=2)
    return torch.cat((after, own, before), dim=2)


def filled_behind(k, size):
    wide = torch.nn.functional.pad(k, (0, 0, 0, 2 * size))
    return wide.unfold(1, 3 * size, size).transpose(-1, -2)


def filled_in_front(k, size):
    wide = torch.nn.functional.pad(k, (0, 0, 2 * size, 0))
    return wide.unfold(1, 3 * size, size).transpose(-1, -2)


def filled_with_infinity(k, size):
    fill = -k.shape[1] % size
    wide = torch.nn.functional.pad(k, (0, 0, size, size + fill), value=-torch.inf)
    return wide.unfold(1, 3 * size, size).transpose(-1, -2)


def filled_with_nan(k, size):
    wide = torch.nn.functional.pad(k, (0, 0, size, size), value=torch.nan)
    return wide.unfold(1, 3 * size, size).transpose(-1, -2)


def whole_blocks_only(k, size):
    wide = torch.nn.functional.pad(k, (0, 0, size, size))
    return wide.unfold(1, 3 * size, size).transpose(-1, -2)


def float_zeros(k, size):
    return near_keys(k.float(), size)


def empties_its_input(k, size):
    found = near_keys_copied(k, size)
    k.zero_()
    return found


def tokens_shuffled(k, size):
    return near_keys(k, size).unflatten(2, (3, size)).transpose(2, 3).flatten(2, 3)


# ---- pairs ----


def pairs(layer_types, half_window, length):
    w = min(half_window, length - 1)
    local = length * (2 * w + 1) - w * (w + 1)
    return sum(length**2 if kind == GLOBAL else local for kind in layer_types)


def bill(local):
    """A bill that counts the pairs of a local layer its own way."""

    def count(layer_types, half_window, length):
        w = half_window if half_window < length else length - 1
        each = local(w, length)
        return sum(length**2 if kind == GLOBAL else each for kind in layer_types)

    return count


def named(name, function):
    function.__name__ = name
    return function


ends_not_cut = named("ends_not_cut", bill(lambda w, n: n * (2 * w + 1)))
not_itself = named("not_itself", bill(lambda w, n: n * 2 * w - w * (w + 1)))
two_w = named("two_w", bill(lambda w, n: n * 2 * w))
ends_twice = named("ends_twice", bill(lambda w, n: n * (2 * w + 1) - 2 * w * (w + 1)))
one_end = named("one_end", bill(lambda w, n: n * (2 * w + 1) - w * (w + 1) // 2))
square_off = named("square_off", bill(lambda w, n: n * (2 * w + 1) - w * w))
sum_too_short = named("sum_too_short", bill(lambda w, n: n * (2 * w + 1) - w * (w - 1)))
a_past = named("a_past", bill(lambda w, n: n * (w + 1) - w * (w + 1) // 2))
everything = named("everything", bill(lambda w, n: n * n))
off_by_a_little = named("off_by_a_little", bill(lambda w, n: n * (2 * w + 1) - w * (w + 1) + 1))


def half_a_square(layer_types, half_window, length):
    return sum(length * (length + 1) // 2 for _ in layer_types)


def first_layer_only(layer_types, half_window, length):
    return pairs(layer_types[:1], half_window, length)


def wider_than_the_text(layer_types, half_window, length):
    local = length * (2 * half_window + 1) - half_window * (half_window + 1)
    return sum(length**2 if kind == GLOBAL else local for kind in layer_types)


def written_window(layer_types, half_window, length):
    return pairs(layer_types, 5, length)


def a_float(layer_types, half_window, length):
    return pairs(layer_types, half_window, length) / 1


SOLUTIONS = {
    "layer_pattern": alternating_attention.layer_pattern,
    "window_mask": alternating_attention.window_mask,
    "reach": reach,
    "packed_mask": alternating_attention.packed_mask,
    "near_keys": near_keys,
    "pairs": pairs,
}

MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "layer_pattern": {
        kinds_swapped: "Which kind is the rare one?",
        ends_each_group: "Where does the pattern start?",
        counts_from_one: "Does counting start at 0 or at 1?",
        first_group_only: "What happens after the first group?",
        forced_end: "force the last layer to be global",
        n_local_ones: "n − 1 of them, not n",
        always_three: "Does `every_n` reach your code?",
        one_layer_short: "8 layers, 7 names",
        own_names: "Which two names do the layers have?",
        numbers: "a list of names",
        at_least_one_local: "What if every layer is global",
        first_two: "your pattern is `G G l l l l l l`",
    },
    "window_mask": {
        inverted: "What does True mean?",
        open_ends: "127 keys and not 129",
        half_open: "3 keys on the left and 2 on the right",
        half_open_left: "2 keys on the left and 3 on the right",
        past_only: "Yours sees the past alone",
        future_only: "May a token look to its left?",
        no_abs: "How far back does your window reach?",
        no_abs_right: "How far ahead does your window reach?",
        halved: "halved once more",
        doubled: "the whole width",
        blind_to_itself: "Does a token see itself?",
        ring: "Is the text a ring?",
        cut_into_blocks: "Does the window move along",
        as_numbers: "made of True and False",
        written_width: "Is a size written into your code?",
        one_row: "Expected `(12, 12)`, got `(12,)`",
        nothing: "Row 5 of your mask",
    },
    "reach": {
        one_window: "What do the layers add to each other?",
        one_side: "How many sides does a window have? Yours counts one",
        one_side_without_itself: "and does a token hear itself? Yours counts one side",
        without_itself: "Yours counts its neighbours alone",
        itself_in_every_layer: "once in every layer",
        multiplied: "Do windows multiply or add up?",
        first_layer_forgotten: "Does the first layer count?",
        one_layer_more: "one too many",
        never_cut: "to the left of the first token",
        cut_on_the_left: "And at the other end?",
        longer_than_the_text: "more tokens than there are",
        global_ignored: "What does one global layer do?",
        only_layer_0_opens: "Does it matter where the global layer stands?",
        all_taken_as_global: "local or global?",
        a_fraction: "a whole number of tokens",
    },
    "packed_mask": {
        window_only: "Where do the documents end?",
        documents_only: "And the window?",
        places_only: "What do your places say about two documents?",
        boundary_late: "token at a boundary",
        boundary_early: "before a boundary",
        causal: "your mask is causal",
        open_window: "Are both ends of the window in it?",
        either: "*Or* or *and*?",
        hidden_instead: "What does True mean?",
        stops_at_none: "What does `half_window=None` mean?",
        global_sees_all: "still no other document",
        three_documents: "wrong for four",
        per_document: "Expected `(11, 11)`",
        rewrites_bounds: "change `cu_seqlens`",
        sees_itself_alone: "your row is `.....#.....`",
    },
    "near_keys": {
        window_last: "Where does `unfold` put the window?",
        blocks_first: "Heads first",
        two_blocks: "How many blocks can a window touch?",
        no_overlap: "How far apart do your groups start?",
        no_fill_at_all: "Expected `(2, 3, 12, 3)`, got `(2, 2, 8, 3)`",
        goes_round: "What stands before the first block?",
        own_block_first: "As in the stream",
        backwards: "Yours run backwards",
        filled_behind: "one block earlier",
        filled_in_front: "one block later",
        filled_with_infinity: "What fills the places",
        filled_with_nan: "NaN",
        whole_blocks_only: "no multiple of the block",
        float_zeros: "Do the zeros have the dtype",
        empties_its_input: "write into `k`",
        tokens_shuffled: "at the wrong place",
    },
    "pairs": {
        ends_not_cut: "What about the first and the last tokens?",
        not_itself: "Yours counts its neighbours alone",
        two_w: "2·W keys for everyone",
        ends_twice: "twice that at each end",
        one_end: "How many ends has a text?",
        square_off: "How many keys are missing at one end? The first token",
        sum_too_short: "the very first token",
        a_past: "How many sides does the window have?",
        everything: "Is a `sliding_attention` layer local?",
        off_by_a_little: "410 True in it. You count 411",
        half_a_square: "How many pairs has one global layer?",
        first_layer_only: "send its own bill",
        wider_than_the_text: "shorter than the window",
        written_window: "wrong for W = 64",
        a_float: "a whole number of pairs",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name):
    return getattr(checks.alternating_attention, name)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("6.")}
    assert mine == {check(name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 5 for m in MISTAKES.values())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result.passed, result
    assert result.message


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_not_written_yet(name):
    def stub(*args):
        raise NotImplementedError

    for answer in (stub, ..., lambda *args: None):
        result = check(name)(answer)
        assert not result.passed and not result.written
        assert result.message.startswith("Not written yet")


@pytest.mark.parametrize(("name", "mistake", "said"), CASES)
def test_a_mistake_gets_its_own_hint(name, mistake, said):
    result = check(name)(mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [check(name)(mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


def test_a_mask_to_be_added_is_told_apart_from_a_mask_of_truth():
    result = check("window_mask")(to_be_added)
    assert not result.passed and "would *add* it to the scores" in result.message


def test_a_mask_that_goes_wrong_on_long_texts_is_caught_by_the_real_model():
    def forgetful(length, half_window):
        return window_of(length, half_window if length < 200 else half_window - 1)

    result = check("window_mask")(forgetful)
    assert not result.passed and "in `mini` the logits move" in result.message


def test_keys_may_be_copied_and_the_remark_says_so():
    assert "nothing is copied" in check("near_keys")(near_keys).message
    result = check("near_keys")(near_keys_copied)
    assert result.passed and "copies every key three times" in result.message


def test_checks_leave_the_random_state_and_the_package_alone():
    state, before = torch.random.get_rng_state(), alternating_attention.window_mask
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert alternating_attention.window_mask is before
