"""The checks of chapter 7: solutions pass, stubs are greeted, each mistake gets its own hint."""

import pytest
import torch

from modernbert_mini import checks, unpadding

# ---- cumulative_lengths ----


def no_zero(lengths):
    return lengths.cumsum(0).int()


def starts_alone(lengths):
    return (lengths.cumsum(0) - lengths).int()


def not_summed(lengths):
    return torch.cat((lengths.new_zeros(1), lengths)).int()


def last_tokens(lengths):
    bounds = unpadding.cumulative_lengths(lengths)
    return torch.cat((bounds[:1], bounds[1:] - 1))


def from_one(lengths):
    return unpadding.cumulative_lengths(lengths) + 1


def zero_behind(lengths):
    return unpadding.cumulative_lengths(lengths).roll(-1)


def what_is_left(lengths):
    return int(lengths.sum()) - unpadding.cumulative_lengths(lengths)


def equal_steps(lengths):
    return lengths[0].int() * torch.arange(len(lengths) + 1, dtype=torch.int32)


def sixty_four_bits(lengths):
    return unpadding.cumulative_lengths(lengths).long()


def as_list(lengths):
    return unpadding.cumulative_lengths(lengths).tolist()


def three_texts(lengths):
    a, b, c = lengths[:3].tolist()
    return torch.tensor([0, a, a + b, a + b + c], dtype=torch.int32)


def sums_in_place(lengths):
    lengths.cumsum_(0)
    return torch.cat((lengths.new_zeros(1), lengths)).int()


def doubled(lengths):
    return 2 * unpadding.cumulative_lengths(lengths)


# ---- positions ----


def by_sums(cu_seqlens):
    """Another way: steps of one, and at each bound one that falls back to 0."""
    step = torch.ones(int(cu_seqlens[-1]), dtype=torch.long)
    step[0] = 0
    step[cu_seqlens[1:-1].long()] = 1 - cu_seqlens.diff()[:-1].long()
    return step.cumsum(0)


def run_on(cu_seqlens):
    return torch.arange(int(cu_seqlens[-1]))


def positions_from_one(cu_seqlens):
    return unpadding.positions(cu_seqlens) + 1


def number_of_the_text(cu_seqlens):
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def still_to_come(cu_seqlens):
    ends = cu_seqlens[1:].repeat_interleave(cu_seqlens.diff())
    return ends - 1 - torch.arange(len(ends))


def only_the_start(cu_seqlens):
    return cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())


def restarts_late(cu_seqlens):
    place = torch.arange(int(cu_seqlens[-1]))
    text = torch.searchsorted(cu_seqlens, place).clamp_min(1) - 1
    return place - cu_seqlens[text]


def restarts_early(cu_seqlens):
    bounds = cu_seqlens.clone()
    bounds[1:-1] -= 1
    return unpadding.positions(bounds)


def restarts_once(cu_seqlens):
    place = run_on(cu_seqlens)
    return torch.where(place < cu_seqlens[1], place, place - cu_seqlens[1])


def as_floats(cu_seqlens):
    return unpadding.positions(cu_seqlens).float()


def one_for_each_text(cu_seqlens):
    return torch.arange(len(cu_seqlens) - 1)


def three_texts_of_four(cu_seqlens):
    parts = (cu_seqlens[1:4] - cu_seqlens[:3]).tolist()
    return torch.cat([torch.arange(n) for n in parts])


def moves_the_bounds(cu_seqlens):
    place = unpadding.positions(cu_seqlens)
    cu_seqlens -= 1
    return place


def all_zero(cu_seqlens):
    return torch.zeros(int(cu_seqlens[-1]), dtype=torch.long)


# ---- unpad and pad ----


def unpad(x, attention_mask):
    packed, indices, _, _ = unpadding.unpad(x, attention_mask)
    return packed, indices


def unpad_by_rows(x, attention_mask):
    rows = [row[m.bool()] for row, m in zip(x, attention_mask, strict=True)]
    return torch.cat(rows), attention_mask.flatten().nonzero().squeeze(-1)


def pad_by_assignment(x, indices, batch, length):
    out = torch.zeros(batch * length, *x.shape[1:], dtype=x.dtype)
    out[indices] = x
    return out.view(batch, length, *x.shape[1:])


def keeps_padding(x, mask):
    return x.flatten(0, 1), torch.arange(mask.numel())


def keeps_the_padding_alone(x, mask):
    return unpad(x, 1 - mask)


def takes_the_first_ones(x, mask):
    lengths = mask.sum(dim=-1).tolist()
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]), unpad(x, mask)[1]


def column_by_column(x, mask):
    return x.transpose(0, 1)[mask.T.bool()], unpad(x, mask)[1]


def as_a_batch(x, mask):
    packed, indices = unpad(x, mask)
    return packed[None], indices


def packed_alone(x, mask):
    return unpad(x, mask)[0]


def place_in_the_row(x, mask):
    return unpad(x, mask)[0], mask.nonzero()[:, 1]


def two_numbers_each(x, mask):
    return unpad(x, mask)[0], mask.nonzero()


def one_too_far(x, mask):
    packed, indices = unpad(x, mask)
    return packed, indices + 1


def ids_only(x, mask):
    return x.view(-1)[mask.flatten().bool()], unpad(mask, mask)[1]


def empties_the_batch(x, mask):
    found = unpad(x, mask)
    if x.dim() == 2:
        x.zero_()
    return found


def backwards(x, mask):
    packed, indices = unpad(x, mask)
    return packed.flip(0), indices


def fills_from_the_left(x, indices, batch, length):
    rows = [x[indices // length == b] for b in range(batch)]
    out = x.new_zeros(batch, length, *x.shape[1:])
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def fills_place_by_place(x, indices, batch, length):
    out = x.new_zeros(batch * length, *x.shape[1:])
    return torch.cat((x, out[len(x) :])).unflatten(0, (batch, length))


def leaves_ones(x, indices, batch, length):
    out = torch.ones(batch * length, *x.shape[1:], dtype=x.dtype)
    return out.index_copy(0, indices, x).unflatten(0, (batch, length))


def cut_off(x, indices, batch, length):
    return unpadding.pad(x.detach(), indices, batch, length)


def still_flat(x, indices, batch, length):
    return unpadding.pad(x, indices, batch, length).flatten(0, 1)


def turned(x, indices, batch, length):
    return unpadding.pad(x.flip(0), indices, batch, length)


def halves_long_streams(x, indices, batch, length):
    return unpadding.pad(x / 2 if len(x) > 50 else x, indices, batch, length)


def not_a_tensor(x, indices, batch, length):
    return unpadding.pad(x, indices, batch, length).tolist()


# ---- best_fit ----


def pack(order=lambda lengths: range(len(lengths)), choose=min, spare=0, refuse=True):
    """A packer that takes texts in some order and chooses a stream by its room, its own way."""

    def packer(lengths, capacity):
        if refuse and max(lengths) > capacity:
            raise ValueError("too long")
        bins, room = [], []
        for i in order(lengths):
            fits = [b for b, free in enumerate(room) if free >= lengths[i] + spare]
            if fits:
                b = choose(fits, key=lambda b: room[b])
            else:
                b = len(bins)
                bins.append([])
                room.append(capacity)
            bins[b].append(i)
            room[b] -= lengths[i]
        return bins

    return packer


def down(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def up(lengths):
    return sorted(range(len(lengths)), key=lambda i: lengths[i])


def first_of(fits, key):
    return fits[0]


def last_of(fits, key):
    return fits[-1]


def later_of_equals(fits, key):
    return min(reversed(fits), key=key)


def named(name, function):
    function.__name__ = name
    return function


best_fit = named("best_fit", pack())
first_in_order = named("first_in_order", pack(choose=first_of))
worst = named("worst", pack(choose=max))
last_opened = named("last_opened", pack(choose=last_of))
ties_later = named("ties_later", pack(choose=later_of_equals))
never_full = named("never_full", pack(spare=1))
best_decreasing = named("best_decreasing", pack(down))
first_decreasing = named("first_decreasing", pack(down, first_of))
shortest_first = named("shortest_first", pack(up))
takes_anything = named("takes_anything", pack(refuse=False))


def never_back(lengths, capacity):
    bins, total = [[]], 0
    for i, n in enumerate(lengths):
        if total + n > capacity:
            bins.append([])
            total = 0
        bins[-1].append(i)
        total += n
    return bins


def one_each(lengths, capacity):
    return [[i] for i in range(len(lengths))]


def lengths_in_bins(lengths, capacity):
    return [[lengths[i] for i in chosen] for chosen in best_fit(lengths, capacity)]


def all_in_one(lengths, capacity):
    return [list(range(len(lengths)))]


def drops_the_last(lengths, capacity):
    return best_fit(lengths[:-1], capacity)


def flat_list(lengths, capacity):
    return [i for chosen in best_fit(lengths, capacity) for i in chosen]


def capacity_of_ten(lengths, capacity):
    return pack(refuse=False)(lengths, 10)


def empties_the_lengths(lengths, capacity):
    bins = best_fit(lengths, capacity)
    lengths.clear()
    return bins


def pairs(lengths, capacity):
    return [[0, 2], [1], [3, 5], [4], [6]]


# ---- mean_pool ----


def mean_pool(x, cu_seqlens):
    lengths = cu_seqlens.diff()
    text = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = x.new_zeros(len(lengths), x.shape[1]).index_add(0, text, x)
    return sums / lengths[:, None].to(x.dtype)


def by_loop(x, cu_seqlens):
    return torch.stack([part.mean(dim=0) for part in x.split(cu_seqlens.diff().tolist())])


def parts_of(x, cu_seqlens):
    return x.split(cu_seqlens.diff().tolist())


def over_everything(x, cu_seqlens):
    return x.mean(dim=0)


def same_for_all(x, cu_seqlens):
    return x.mean(dim=0).expand(len(cu_seqlens) - 1, -1)


def over_the_numbers(x, cu_seqlens):
    return torch.stack([part.mean()[None] for part in parts_of(x, cu_seqlens)])


def sums(x, cu_seqlens):
    return torch.stack([part.sum(dim=0) for part in parts_of(x, cu_seqlens)])


def by_the_longest(x, cu_seqlens):
    return sums(x, cu_seqlens) / int(cu_seqlens.diff().max())


def by_the_stream(x, cu_seqlens):
    return sums(x, cu_seqlens) / len(x)


def by_one_more(x, cu_seqlens):
    return sums(x, cu_seqlens) / (cu_seqlens.diff()[:, None] + 1)


def cls(x, cu_seqlens):
    return x[cu_seqlens[:-1].long()]


def one_token_more(x, cu_seqlens):
    bounds = cu_seqlens.tolist()
    return torch.stack([x[a : b + 1].mean(dim=0) for a, b in zip(bounds, bounds[1:], strict=False)])


def without_cls(x, cu_seqlens):
    return torch.stack([p[1:].sum(dim=0) / max(1, len(p) - 1) for p in parts_of(x, cu_seqlens)])


def largest(x, cu_seqlens):
    return torch.stack([part.amax(dim=0) for part in parts_of(x, cu_seqlens)])


def first_three(x, cu_seqlens):
    return by_loop(x, cu_seqlens)[:3]


def no_gradient(x, cu_seqlens):
    return by_loop(x.detach(), cu_seqlens)


def always_float(x, cu_seqlens):
    return by_loop(x.float(), cu_seqlens)


def clears_the_stream(x, cu_seqlens):
    found = by_loop(x, cu_seqlens)
    if not x.requires_grad:
        x.zero_()
    return found


def half_of_it(x, cu_seqlens):
    return by_loop(x, cu_seqlens) / 2


# ---- collate ----


def collate(features):
    stream = unpadding.FlatteningCollator()(features)
    return {name: stream[name] for name in ("input_ids", "cu_seqlens", "labels")}


def collate_by_padding(features):
    """Another way: a rectangle first."""
    columns = {name: torch.tensor([f[name] for f in features]) for name in features[0]}
    ids, _, cu_seqlens, _ = unpadding.unpad(columns["input_ids"], columns["attention_mask"])
    labels, *_ = unpadding.unpad(columns["labels"], columns["attention_mask"])
    return {"input_ids": ids, "cu_seqlens": cu_seqlens.long(), "labels": labels}


def changed(**changes):
    """A collator whose result is right but for these entries, each computed from the right one."""

    def collator(features):
        stream = collate(features)
        return stream | {name: change(stream) for name, change in changes.items()}

    return collator


def joined(features, name):
    return torch.tensor([i for feature in features for i in feature[name]])


def batch_of_one(features):
    return {name: x[None] for name, x in collate(features).items()}


def keeps_all_places(features):
    stream = {"input_ids": joined(features, "input_ids"), "labels": joined(features, "labels")}
    return stream | {"cu_seqlens": torch.tensor([0, 6, 12, 18])}


def takes_the_front(features):
    cut = [{k: v[: sum(f["attention_mask"])] for k, v in f.items()} for f in features]
    for feature in cut:
        feature["attention_mask"] = [1] * len(feature["input_ids"])
    return collate(cut)


def drops_unlabelled(features):
    masked = [f | {"attention_mask": [int(y != -100) for y in f["labels"]]} for f in features]
    return collate(masked)


def longest_first(features):
    return collate(sorted(features, key=lambda f: -sum(f["attention_mask"])))


def drops_cls(features):
    cut = [dict(f) for f in features]
    for feature in cut:
        mask = list(feature["attention_mask"])
        mask[mask.index(1)] = 0
        feature["attention_mask"] = mask
    return collate(cut)


def marks_features(features):
    features[0]["seen"] = True
    return collate([{k: v for k, v in f.items() if k != "seen"} for f in features])


def labels_with_padding(features):
    return collate(features) | {"labels": joined(features, "labels")}


def as_a_tuple(features):
    return tuple(collate(features).values())


def without_bounds(features):
    stream = collate(features)
    del stream["cu_seqlens"]
    return stream


def first_labels_gone(stream):
    labels = stream["labels"].clone()
    labels[stream["cu_seqlens"][:-1].long()] = -100
    return labels


def three_texts_alone(features):
    stream = collate(features)
    return stream | {"labels": torch.where(stream["labels"] > 200, -100, stream["labels"])}


lists = named("lists", changed(labels=lambda s: s["labels"].tolist()))
row_bounds = named("row_bounds", changed(cu_seqlens=lambda s: torch.tensor([0, 6, 12, 18])))
bare_lengths = named("bare_lengths", changed(cu_seqlens=lambda s: s["cu_seqlens"].diff()))
like_a_decoder = named("like_a_decoder", changed(labels=first_labels_gone))
ids_as_labels = named("ids_as_labels", changed(labels=lambda s: s["input_ids"]))
labels_shifted = named(
    "labels_shifted",
    changed(labels=lambda s: torch.cat((s["labels"][1:], torch.tensor([-100])))),
)
zeros_for_none = named("zeros_for_none", changed(labels=lambda s: s["labels"].clamp_min(0)))
labels_turned = named("labels_turned", changed(labels=lambda s: s["labels"].flip(0)))


SOLUTIONS = {
    "cumulative_lengths": (unpadding.cumulative_lengths,),
    "positions": (unpadding.positions,),
    "unpad_and_pad": (unpad, unpadding.pad),
    "best_fit": (best_fit,),
    "mean_pool": (mean_pool,),
    "collate": (collate,),
}

MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "cumulative_lengths": {
        no_zero: "Where does the first text start?",
        starts_alone: "Where does the last text end?",
        not_summed: "Are these places or lengths?",
        last_tokens: "the first token after it?",
        from_one: "Where does counting start?",
        zero_behind: "On which side is the 0?",
        what_is_left: "From which end do you sum?",
        equal_steps: "Have all texts the same length?",
        sixty_four_bits: "yours is `torch.int64`",
        as_list: "got a value of type `list`",
        three_texts: "wrong for five",
        sums_in_place: "write into `lengths`",
        doubled: "You say [0, 10, 14, 20]",
    },
    "positions": {
        run_on: "Your positions run on",
        positions_from_one: "0, not 1",
        number_of_the_text: "the number of the text?",
        still_to_come: "From which end do you count?",
        only_the_start: "What do you take off from what?",
        restarts_late: "the token *at* a bound",
        restarts_early: "One token too early",
        restarts_once: "What does the third bound say?",
        as_floats: "whole numbers",
        one_for_each_text: "Expected `(7,)`, got `(3,)`",
        three_texts_of_four: "wrong for [0, 2, 9, 30, 31]",
        moves_the_bounds: "write into `cu_seqlens`",
        all_zero: "You have [0, 0, 0, 0, 0, 0, 0]",
    },
    "unpad_and_pad": {
        (keeps_padding, unpadding.pad): "Is the padding gone?",
        (keeps_the_padding_alone, unpadding.pad): "You took the padding and left the text",
        (takes_the_first_ones, unpadding.pad): "ask the mask, not the length",
        (column_by_column, unpadding.pad): "column after column?",
        (as_a_batch, unpadding.pad): "one row and no batch",
        (packed_alone, unpadding.pad): "What does `my_unpad` return?",
        (place_in_the_row, unpadding.pad): "the place in the row, or in the whole batch?",
        (two_numbers_each, unpadding.pad): "one index for each token",
        (one_too_far, unpadding.pad): "the indices are [0, 1, 2, 5",
        (ids_only, unpadding.pad): "take vectors too",
        (empties_the_batch, unpadding.pad): "write into `x`",
        (backwards, unpadding.pad): "With the padding on the right, the real tokens are",
        (unpad, fills_from_the_left): "Did you use the indices?",
        (unpad, fills_place_by_place): "Where does each token go?",
        (unpad, leaves_ones): "What stands where padding was?",
        (unpad, cut_off): "Can a gradient find its way back?",
        (unpad, still_flat): "Expected `(3, 5, 2)`, got `(15, 2)`",
        (unpad, turned): "at another place than they came from",
        (unpad, not_a_tensor): "Is the padded batch a tensor?",
        (unpad, halves_long_streams): "round `mini` the vectors move by",
    },
    "best_fit": {
        first_in_order: "Yours is first fit",
        worst: "The fullest stream or the emptiest?",
        never_back: "never goes back",
        last_opened: "opened last",
        never_full: "to the very brim",
        ties_later: "yours takes the later",
        best_decreasing: "best fit *decreasing*",
        first_decreasing: "Is this `first_fit` of the chapter?",
        shortest_first: "Yours takes the shortest first",
        one_each: "Do texts share a stream?",
        lengths_in_bins: "Lengths or indices?",
        all_in_one: "Is a stream overfull?",
        drops_the_last: "in exactly one stream",
        flat_list: "A list of streams",
        capacity_of_ten: "wrong for 16",
        takes_anything: "raise a `ValueError`",
        empties_the_lengths: "change the list of lengths",
        pairs: "Follow your code from there",
    },
    "mean_pool": {
        over_everything: "One vector for each text",
        same_for_all: "Whose mean is it?",
        over_the_numbers: "Over which dimension is the mean?",
        sums: "A sum or a mean?",
        by_the_longest: "the longest one for all",
        by_the_stream: "not of the stream",
        by_one_more: "one too many",
        cls: "Is this the mean, or [CLS]?",
        one_token_more: "Where does a text end?",
        without_cls: "Does the first token count?",
        largest: "Mean or maximum?",
        first_three: "wrong for five",
        no_gradient: "cut off from the stream",
        always_float: "Which dtype comes out?",
        clears_the_stream: "write into `x`",
        half_of_it: "Compute the second text by hand",
    },
    "collate": {
        batch_of_one: "One row, or a batch of one row?",
        keeps_all_places: "Is the padding gone?",
        takes_the_front: "yours takes the first ones",
        drops_unlabelled: "Is a token without a label padding?",
        longest_first: "In which order",
        drops_cls: "the stream is [11, 12, 13, 14, 15, 21",
        marks_features: "change the features?",
        labels_with_padding: "a label for each token of the stream?",
        as_a_tuple: "A dict is asked for",
        without_bounds: "Which key is missing?",
        lists: "Is `labels` a tensor?",
        row_bounds: "Whose lengths are in your bounds?",
        bare_lengths: "yours are [5, 2, 4]",
        like_a_decoder: "Where is the label of each first token?",
        ids_as_labels: "Are the labels the ids?",
        labels_shifted: "beside its own token?",
        zeros_for_none: "What stands where no label counts?",
        labels_turned: "The labels of texts of 5, 2, 4 tokens",
        three_texts_alone: "Right for three short texts",
    },
}


def label(mistake):
    return "-".join(m.__name__ for m in mistake) if isinstance(mistake, tuple) else mistake.__name__


CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{label(mistake)}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name, answer):
    answers = answer if isinstance(answer, tuple) else (answer,)
    return getattr(checks.unpadding, name)(*answers)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("7.")}
    assert mine == {getattr(checks.unpadding, name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 5 for m in MISTAKES.values())


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name, SOLUTIONS[name])
    assert result.passed, result
    assert result.message


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("positions", by_sums),
        ("unpad_and_pad", (unpad_by_rows, pad_by_assignment)),
        ("mean_pool", by_loop),
        ("collate", collate_by_padding),
    ],
)
def test_another_way_passes_too(name, answer):
    result = check(name, answer)
    assert result.passed, result


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_stub_is_not_written_yet(name):
    def stub(*args):
        raise NotImplementedError

    for answer in (stub, ..., lambda *args: None):
        result = check(name, (answer,) * len(SOLUTIONS[name]))
        assert not result.passed and not result.written
        assert result.message.startswith("Not written yet")


def test_half_an_answer_is_not_written_yet():
    def stub(*args):
        raise NotImplementedError

    result = checks.unpadding.unpad_and_pad(unpad, stub)
    assert not result.passed and not result.written


@pytest.mark.parametrize(("name", "mistake", "said"), CASES)
def test_a_mistake_gets_its_own_hint(name, mistake, said):
    result = check(name, mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [check(name, mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name, solution)
    assert torch.equal(torch.random.get_rng_state(), state)
