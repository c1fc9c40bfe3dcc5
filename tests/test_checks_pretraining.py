"""The checks of chapter 12: solutions pass, stubs are greeted, each mistake gets its own hint."""

import math

import pytest
import torch

from modernbert_mini import checks, pretraining

# ---- mask ----


def mask(ids, generator, mask_id, special, vocab_size, probability=0.3):
    settings = {"mask_token_id": mask_id, "special_ids": special.tolist()}
    return pretraining.mask_tokens(
        ids, generator, **settings, vocab_size=vocab_size, probability=probability
    )


def masker(masked=0.8, another=0.1, spare=True, spare_drawn=True, labels=None, **fixed):
    """A mask with one thing done otherwise."""

    def answer(ids, generator, mask_id, special, vocab_size, probability=0.3):
        probability = fixed.get("probability", probability)
        chosen = torch.rand(ids.shape, generator=generator) < probability
        if spare:
            chosen &= ~torch.isin(ids, special)
        ordinary = torch.arange(vocab_size)
        if spare_drawn:
            ordinary = ordinary[~torch.isin(ordinary, special)]
        fate = torch.rand(ids.shape, generator=generator)
        draw = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
        if "one_draw" in fixed:
            draw = ordinary[7].expand(ids.shape)
        seen = torch.where(chosen & (fate < masked), mask_id, ids)
        other = chosen & (fate >= masked) & (fate < masked + another)
        seen = torch.where(other, draw, seen)
        right = torch.where(chosen, ids, -100)
        return seen, labels(ids, seen, right, mask_id) if labels else right

    return answer


def writes_into_ids(ids, generator, mask_id, special, vocab_size, probability=0.3):
    seen, labels = mask(ids, generator, mask_id, special, vocab_size, probability)
    ids.copy_(seen)
    return seen, labels


def inverted(ids, generator, mask_id, special, vocab_size, probability=0.3):
    return mask(ids, generator, mask_id, special, vocab_size, 1 - probability)


def two_draws(ids, generator, mask_id, special, vocab_size, probability=0.3):
    """80 % [MASK], and 10 % of what is left."""
    seen, labels = masker(another=0.02)(ids, generator, mask_id, special, vocab_size, probability)
    return seen, labels


def own_chance(ids, generator, mask_id, special, vocab_size, probability=0.3):
    fresh = torch.Generator()
    fresh.seed()
    return mask(ids, fresh, mask_id, special, vocab_size, probability)


def fixed_chance(ids, generator, mask_id, special, vocab_size, probability=0.3):
    fresh = torch.Generator().manual_seed(5)
    return mask(ids, fresh, mask_id, special, vocab_size, probability)


def changes_others(ids, generator, mask_id, special, vocab_size, probability=0.3):
    seen, labels = mask(ids, generator, mask_id, special, vocab_size, probability)
    return torch.where((labels < 0) & (ids == 50), 51, seen), labels


def no_label_where_kept(ids, seen, right, mask_id):
    return torch.where(seen == ids, -100, right)


def label_where_masked(ids, seen, right, mask_id):
    return torch.where(seen == mask_id, right, -100)


# ---- rate ----


def rate(tokens, warmup, decay, total):
    return pretraining.warmup_stable_decay(tokens, warmup=warmup, decay=decay, total=total)


def fall(curve):
    """The schedule with another curve: from how far the fall has come to the share."""

    def answer(tokens, warmup, decay, total):
        start = total - decay
        if tokens <= start or not decay:
            return rate(tokens, warmup, decay, total)
        return max(0.0, curve((tokens - start) / decay, tokens, total))

    return answer


def starts_at_one(tokens, warmup, decay, total):
    return 1.0 if tokens == 0 else rate(tokens, warmup, decay, total)


def square_warmup(tokens, warmup, decay, total):
    value = rate(tokens, warmup, decay, total)
    return value**2 if tokens < warmup else value


def no_plateau(tokens, warmup, decay, total):
    if tokens < warmup:
        return tokens / warmup
    return max(0.0, 1 - (tokens - warmup) / (total - warmup))


def falls_early(tokens, warmup, decay, total):
    return rate(tokens, warmup, total - decay, total)


def below_zero(tokens, warmup, decay, total):
    if tokens < warmup or tokens <= total - decay or not decay:
        return rate(tokens, warmup, decay, total)
    return 1 - math.sqrt((tokens - total + decay) / decay)


def divides_by_warmup(tokens, warmup, decay, total):
    return rate(tokens, warmup, decay, total) * min(1, (tokens + 1) / warmup * 1e9)


def divides_by_decay(tokens, warmup, decay, total):
    return rate(tokens, warmup, decay, total) + 0 * (1 / decay)


def dead_without_decay(tokens, warmup, decay, total):
    return rate(tokens, warmup, decay, total) if decay or tokens < total else 0.0


def these_lengths(tokens, warmup, decay, total):
    return rate(tokens, min(warmup, 100), decay, 1000) if total == 1000 else 1.0


# ---- adamw ----


def adamw(w, g, m, v, t, rate, peak, betas=(0.9, 0.98), eps=1e-6, decay=0.0):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return w * (1 - decay * rate / peak) - rate * m_hat / (v_hat.sqrt() + eps), m, v


def by_the_package(w, g, m, v, t, rate, peak, betas=(0.9, 0.98), eps=1e-6, decay=0.0):
    """The same through the package's class."""
    parameter = torch.nn.Parameter(w.clone())
    optimiser = pretraining.AdamW([parameter], peak, betas, eps, decay)
    (group,) = optimiser.param_groups
    group["lr"] = rate
    # Its means are kept corrected; these are plain.
    state = {"step": t - 1, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    if t > 1:
        state["exp_avg"] /= 1 - betas[0] ** (t - 1)
        state["exp_avg_sq"] /= 1 - betas[1] ** (t - 1)
    with torch.no_grad():
        optimiser.update(parameter, g, state, group)
    means = zip((state["exp_avg"], state["exp_avg_sq"]), betas, strict=True)
    plain = (mean * (1 - beta**t) for mean, beta in means)
    return parameter.detach(), *plain


def step(**other):
    """The step with one of its parts done otherwise; each part may look at all that there is."""

    def answer(w, g, m, v, t, rate, peak, betas=(0.9, 0.98), eps=1e-6, decay=0.0):
        at = {"w": w, "g": g, "m0": m, "v0": v, "t": t, "rate": rate, "peak": peak}
        at |= {"b1": betas[0], "b2": betas[1], "eps": eps, "decay": decay}
        parts = {
            "m": lambda a: a["b1"] * a["m0"] + (1 - a["b1"]) * a["g"],
            "v": lambda a: a["b2"] * a["v0"] + (1 - a["b2"]) * a["g"] ** 2,
            "mh": lambda a: a["m"] / (1 - a["b1"] ** a["t"]),
            "vh": lambda a: a["v"] / (1 - a["b2"] ** a["t"]),
            "move": lambda a: a["rate"] * a["mh"] / (a["vh"].sqrt() + a["eps"]),
            "kept": lambda a: a["w"] * (1 - a["decay"] * a["rate"] / a["peak"]),
            "new": lambda a: a["kept"] - a["move"],
        } | other
        for name in ("m", "v", "mh", "vh", "move", "kept", "new"):
            at[name] = parts[name](at)
        return at["new"], parts.get("m_out", lambda a: a["m"])(at), at["v"]

    return answer


def in_place(w, g, m, v, t, rate, peak, **more):
    new = adamw(w, g, m, v, t, rate, peak, **more)
    for x, y in zip((w, m, v), new, strict=True):
        x.copy_(y)
    return new


# ---- accumulate ----


def accumulate(model, streams):
    counts = [int((stream["labels"] != -100).sum()) for stream in streams]
    total = 0.0
    for stream, count in zip(streams, counts, strict=True):
        if count:
            loss = model(**stream).loss * (count / sum(counts))
            loss.backward()
            total += loss.item()
    return total


def by_sums(model, streams):
    """Another way: sums of losses, and one division of all gradients at the end."""
    counts = [int((stream["labels"] != -100).sum()) for stream in streams]
    total = 0.0
    for stream, count in zip(streams, counts, strict=True):
        loss = model(**stream).loss.nan_to_num() * count if count else None
        if loss is not None:
            loss.backward()
            total += loss.item()
    for parameter in model.parameters():
        parameter.grad /= sum(counts)
    return total / sum(counts)


def weigh(weights, result=None, forget=False):
    """Accumulation with other weights: from hidden tokens and lengths to one for each stream."""

    def answer(model, streams):
        counts = [int((stream["labels"] != -100).sum()) for stream in streams]
        lengths = [len(stream["input_ids"]) for stream in streams]
        total = 0.0
        for stream, weight in zip(streams, weights(counts, lengths), strict=True):
            if forget:
                model.zero_grad()
            loss = model(**stream).loss * weight
            loss.backward()
            total += loss.item()
        return total if result is None else result

    return answer


def shares(numbers):
    return [number / sum(numbers) for number in numbers]


def keeps_the_graph(model, streams):
    accumulate(model, streams)
    return sum(model(**stream).loss for stream in streams)


def no_backward(model, streams):
    return sum(model(**stream).loss.item() for stream in streams) / len(streams)


def first_alone(model, streams):
    loss = model(**streams[0]).loss
    loss.backward()
    return loss.item()


# ---- cut ----


def cut(n, room):
    parts = -(-n // room)
    return [n // parts + (i < n % parts) for i in range(parts)] if parts else []


def a_stub_is_left(n, room):
    return [room] * (n // room) + [n % room] * (n % room > 0)


def rest_is_dropped(n, room):
    return [room] * (n // room)


def equal_and_short(n, room):
    parts = -(-n // room)
    return [n // parts] * parts


def too_long(n, room):
    return [room] * -(-n // room)


def rounded_down(n, room):
    parts = max(1, n // room)
    return [n // parts] * parts


def bounds(n, room):
    parts = -(-n // room)
    return [n * i // parts for i in range(parts + 1)]


def one_more(n, room):
    parts = n // room + 1
    lengths = [n // parts + (i < n % parts) for i in range(parts)]
    return lengths if n else []


def divides_by_none(n, room):
    parts = -(-n // room)
    least, more = divmod(n, parts)
    return [least + (i < more) for i in range(parts)]


def an_empty_piece(n, room):
    return cut(n, room) or [0]


def ten_tokens(n, room):
    return {10: [4, 3, 3], 0: [], 8: [4, 4]}.get(n, [n])


# ---- tile_heads ----


def tile_heads(weight, head_dim, heads, size):
    parts = weight.unflatten(0, (3, -1, head_dim))
    rows, columns = pretraining.wrap(heads, parts.shape[1]), pretraining.wrap(size, parts.shape[3])
    return parts[:, rows][..., columns].flatten(0, 2)


def tiler(rows=pretraining.wrap, columns=pretraining.wrap, order=(0, 1, 2, 3)):
    def answer(weight, head_dim, heads, size):
        parts = weight.unflatten(0, (3, -1, head_dim))
        h, c = rows(heads, parts.shape[1]), columns(size, parts.shape[3])
        return parts[:, h][..., c].permute(order).flatten(0, 2)

    return answer


def from_the_edge(new, old):
    return torch.arange(new) % old


def more_before(new, old):
    return (torch.arange(new) - -(-(new - old) // 2)) % old


def mirrored(new, old):
    """Turns back at each edge."""
    place = (torch.arange(new) - (new - old) // 2) % (2 * old)
    return torch.where(place < old, place, 2 * old - 1 - place)


def all_rows_as_one(weight, head_dim, heads, size):
    rows = pretraining.wrap(3 * heads * head_dim, len(weight))
    return weight[rows][:, pretraining.wrap(size, weight.shape[1])]


def row_by_row(weight, head_dim, heads, size):
    parts = weight.unflatten(0, (3, -1))
    rows = pretraining.wrap(heads * head_dim, parts.shape[1])
    return parts[:, rows][..., pretraining.wrap(size, weight.shape[1])].flatten(0, 1)


def zeros_around(weight, head_dim, heads, size):
    parts = weight.unflatten(0, (3, -1, head_dim))
    out = weight.new_zeros(3, heads, head_dim, size)
    old, columns = parts.shape[1], parts.shape[3]
    h, c = (heads - old) // 2, (size - columns) // 2
    out[:, h : h + old, :, c : c + columns] = parts
    return out.flatten(0, 2)


def once_round(weight, head_dim, heads, size):
    if heads == 7:
        return zeros_around(weight, head_dim, heads, size)
    return tile_heads(weight, head_dim, heads, size)


def these_sizes(weight, head_dim, heads, size):
    return tile_heads(weight, head_dim, 6, 9)[: 3 * heads * head_dim, :size]


def tile_in_place(weight, head_dim, heads, size):
    out = tile_heads(weight, head_dim, heads, size)
    weight.zero_()
    return out


def never_written(*arguments, **more):
    raise NotImplementedError


def returns_nothing(*arguments, **more):
    return None


CHECKS = {
    "mask": checks.pretraining.mask,
    "rate": checks.pretraining.rate,
    "adamw": checks.pretraining.adamw,
    "accumulate": checks.pretraining.accumulate,
    "cut": checks.pretraining.cut,
    "tile_heads": checks.pretraining.tile_heads,
}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("mask", mask),
        ("mask", masker()),
        ("rate", rate),
        ("adamw", adamw),
        ("adamw", by_the_package),
        ("adamw", step()),
        ("accumulate", accumulate),
        ("accumulate", by_sums),
        ("cut", cut),
        ("tile_heads", tile_heads),
        ("tile_heads", tiler()),
    ],
)
def test_solutions_pass(name, answer):
    result = CHECKS[name](answer)
    assert result, result.message
    assert result.message


@pytest.mark.parametrize("stub", [never_written, returns_nothing, None, ...])
@pytest.mark.parametrize("name", CHECKS)
def test_stubs_are_greeted(name, stub):
    result = CHECKS[name](stub)
    assert not result and not result.written and "Not written yet" in result.message


MISTAKES = [
    ("mask", writes_into_ids, "write into `ids`"),
    ("mask", lambda *a, **k: mask(*a, **k)[0], "Two tensors"),
    (
        "mask",
        masker(labels=lambda ids, seen, right, m: torch.where(right < 0, -100, seen)),
        "hold what the model *sees*",
    ),
    ("mask", masker(labels=lambda ids, seen, right, m: ids), "a label to every token"),
    (
        "mask",
        masker(labels=lambda ids, seen, right, m: torch.where(right < 0, -100, (ids + 1) % 100)),
        "the id that stood",
    ),
    (
        "mask",
        masker(labels=lambda ids, seen, right, m: torch.full_like(ids, -100)),
        "All your labels",
    ),
    ("mask", masker(spare=False), "[CLS] is nothing to guess"),
    ("mask", changes_others, "not asked about"),
    ("mask", masker(probability=0.15), "BERT's rate"),
    ("mask", inverted, "seven tokens in ten"),
    ("mask", masker(another=0.0, labels=label_where_masked), "All 30 % carry a label"),
    ("mask", masker(labels=no_label_where_kept), "One kind of yours"),
    ("mask", masker(probability=0.5), "30 % of the ordinary"),
    ("mask", masker(masked=1.0, another=0.0), "are all [MASK]"),
    ("mask", masker(masked=0.0, another=0.9), "None of yours is [MASK]"),
    ("mask", masker(masked=0.9, another=0.1), "stay as they are? None"),
    ("mask", masker(masked=0.8, another=0.0), "become [MASK], or stay"),
    ("mask", two_draws, "*remaining* fifth"),
    ("mask", masker(masked=0.6, another=0.2), "80 % of the chosen show"),
    ("mask", masker(one_draw=True), "same id everywhere"),
    ("mask", masker(spare_drawn=False), "be special"),
    ("mask", masker(masked=0.8, another=0.15), "10 % of the chosen stay"),
    ("mask", own_chance, "come from `generator`"),
    ("mask", fixed_chance, "Is `generator` used"),
    ("mask", masker(probability=0.3), "`probability=0.0`"),
    ("rate", lambda *a: torch.tensor(rate(*a)), "a number"),
    ("rate", starts_at_one, "Where does the warm-up start"),
    ("rate", square_warmup, "A quarter through the warm-up"),
    ("rate", no_plateau, "Between warm-up and fall"),
    ("rate", falls_early, "When does the fall begin"),
    ("rate", fall(lambda x, t, n: 1 - x), "straight line"),
    ("rate", fall(lambda x, t, n: 1 - x**2), "Root or square"),
    ("rate", fall(lambda x, t, n: math.sqrt(x)), "one *minus the root*"),
    ("rate", fall(lambda x, t, n: math.sqrt(max(0.0, 1 - x))), "root of what is left"),
    ("rate", fall(lambda x, t, n: (1 + math.cos(math.pi * x)) / 2), "a cosine"),
    ("rate", fall(lambda x, t, n: 1 - math.sqrt(t / n)), "not from the first token"),
    ("rate", fall(lambda x, t, n: 1 - math.sqrt((t - 600) / n)), "not by `total`"),
    ("rate", fall(lambda x, t, n: 1 - x**0.25), "After 16 % of the fall"),
    ("rate", fall(lambda x, t, n: max(0.2, 1 - math.sqrt(x))), "At the end"),
    ("rate", below_zero, "beyond the end"),
    ("rate", divides_by_warmup, "What if `warmup` is 0"),
    ("rate", divides_by_decay, "What if `decay` is 0"),
    ("rate", dead_without_decay, "Without `decay`"),
    ("rate", these_lengths, "wrong for others"),
    ("adamw", in_place, "change what it was given"),
    ("adamw", lambda *a, **k: adamw(*a, **k)[0], "Three tensors"),
    ("adamw", step(m=lambda a: 0.1 * a["m0"] + 0.9 * a["g"]), "slow one"),
    ("adamw", step(m=lambda a: a["m0"] + 0.1 * a["g"]), "still a mean"),
    ("adamw", step(m=lambda a: 0.98 * a["m0"] + 0.02 * a["g"]), "mean of the gradient? The first"),
    ("adamw", step(m_out=lambda a: a["mh"]), "the correction is for the step"),
    ("adamw", step(m=lambda a: a["m0"]), "return the old `m`"),
    ("adamw", step(m=lambda a: a["g"]), "The new `m` is"),
    ("adamw", step(v=lambda a: 0.98 * a["v0"] + 0.02 * a["g"]), "*squared* gradient"),
    ("adamw", step(v=lambda a: 0.9 * a["v0"] + 0.1 * a["g"] ** 2), "squares? The second"),
    ("adamw", step(v=lambda a: 0.98 * a["v0"] + 0.02 * a["g"].abs()), "Absolute value"),
    ("adamw", step(v=lambda a: a["v0"]), "return the old `v`"),
    ("adamw", step(v=lambda a: a["g"] ** 2), "The new `v` is"),
    ("adamw", step(mh=lambda a: a["m"], vh=lambda a: a["v"]), "began at zero"),
    ("adamw", step(new=lambda a: a["kept"] + a["move"]), "Uphill"),
    ("adamw", step(move=lambda a: a["rate"] * a["mh"] / (a["vh"] + a["eps"])), "root missing"),
    ("adamw", step(move=lambda a: a["peak"] * a["mh"] / (a["vh"].sqrt() + a["eps"])), "Which rate"),
    ("adamw", step(move=lambda a: a["rate"] * a["g"] / (a["vh"].sqrt() + a["eps"])), "Along what"),
    (
        "adamw",
        step(
            mh=lambda a: a["m"] / (1 - a["b1"] ** (a["t"] - 1)),
            vh=lambda a: a["v"] / (1 - a["b2"] ** (a["t"] - 1)),
        ),
        "does `t` count",
    ),
    (
        "adamw",
        step(
            mh=lambda a: a["m0"] / (1 - a["b1"] ** a["t"]),
            vh=lambda a: a["v0"] / (1 - a["b2"] ** a["t"]),
        ),
        "Old means or new",
    ),
    ("adamw", step(move=lambda a: a["rate"] * a["mh"]), "The step is `rate` times"),
    ("adamw", step(kept=lambda a: a["w"] * (1 - a["decay"] * a["rate"])), "PyTorch's rule"),
    ("adamw", step(kept=lambda a: a["w"] * (1 - a["decay"])), "follow the schedule"),
    (
        "adamw",
        step(kept=lambda a: a["w"] * (1 + a["decay"] * a["rate"] / a["peak"])),
        "Yours grows",
    ),
    ("adamw", step(kept=lambda a: a["w"]), "Is `decay` used"),
    (
        "adamw",
        step(new=lambda a: (a["w"] - a["move"]) * (1 - a["decay"] * a["rate"] / a["peak"])),
        "What shrinks",
    ),
    (
        "adamw",
        step(kept=lambda a: a["w"] * (1 - a["decay"] * a["peak"] / a["rate"])),
        "peak over rate",
    ),
    ("adamw", step(kept=lambda a: a["w"] - a["decay"]), "the old weight is multiplied"),
    ("adamw", step(move=lambda a: a["rate"] * a["mh"] / a["vh"].sqrt()), "never was a gradient"),
    (
        "adamw",
        step(
            move=lambda a: (
                a["rate"]
                * a["mh"]
                / (a["vh"] + a["eps"] ** 2 if a["eps"] < 1e-3 else a["vh"] + a["eps"])
                .sqrt()
                .clamp_min(1e-9)
            )
        ),
        "Inside the root",
    ),
    ("accumulate", lambda model, streams: f"{accumulate(model, streams)}", "One number"),
    ("accumulate", keeps_the_graph, "hold the graph"),
    ("accumulate", no_backward, "call `backward`"),
    ("accumulate", weigh(lambda c, n: [1 / len(c)] * len(c)), "average the streams' means"),
    ("accumulate", weigh(lambda c, n: [1.0] * len(c)), "add the streams' gradients up"),
    ("accumulate", weigh(lambda c, n: shares(n)), "the *length* of a stream"),
    ("accumulate", weigh(lambda c, n: c), "do not divide"),
    ("accumulate", weigh(lambda c, n: shares(c), forget=True), "no `zero_grad`"),
    ("accumulate", weigh(lambda c, n: [1.0] * len(c), forget=True), "no `zero_grad`"),
    ("accumulate", first_alone, "Only the first"),
    ("accumulate", weigh(lambda c, n: shares([x * x for x in c])), "not that of the mean"),
    ("accumulate", weigh(lambda c, n: shares(c), result=1.0), "The loss of the batch is"),
    ("accumulate", weigh(lambda c, n: shares(c)), "0 / 0"),
    ("cut", lambda n, room: 3, "A list of whole numbers"),
    ("cut", a_stub_is_left, "a stub at the end"),
    ("cut", rest_is_dropped, "drop the rest"),
    ("cut", equal_and_short, "Three times three"),
    ("cut", too_long, "longer than it is"),
    ("cut", rounded_down, "round the number of pieces *up*"),
    ("cut", lambda n, room: [n], "Does the piece fit"),
    ("cut", lambda n, room: [2] * (n // 2), "As few pieces"),
    ("cut", bounds, "Bounds or lengths"),
    ("cut", lambda n, room: [1] * (n - 1), "sum to 9"),
    ("cut", lambda n, room: [4, 5, 1], "One of yours has 5"),
    ("cut", lambda n, room: [2, 4, 4], "differ by one token"),
    ("cut", divides_by_none, "empty document? Yours divides"),
    ("cut", an_empty_piece, "has no piece"),
    ("cut", one_more, "fits exactly"),
    ("cut", ten_tokens, "wrong for 1,000"),
    ("tile_heads", tile_in_place, "write into the weight"),
    ("tile_heads", lambda w, d, h, s: tile_heads(w, d, h, s).T, "Which shape"),
    ("tile_heads", all_rows_as_one, "queries end and keys begin"),
    ("tile_heads", row_by_row, "a head copied whole"),
    ("tile_heads", tiler(rows=from_the_edge), "yours begin at the top"),
    ("tile_heads", tiler(columns=from_the_edge), "yours begin at the left"),
    ("tile_heads", tiler(rows=from_the_edge, columns=from_the_edge), "begins at the edge"),
    ("tile_heads", tiler(rows=more_before), "Three heads more"),
    ("tile_heads", tiler(columns=more_before), "Three columns more"),
    ("tile_heads", tiler(rows=more_before, columns=more_before), "for heads and columns"),
    ("tile_heads", tiler(rows=mirrored), "turn back"),
    ("tile_heads", zeros_around, "is zero there"),
    ("tile_heads", tiler(order=(1, 0, 2, 3)), "the part or the head"),
    ("tile_heads", lambda w, d, h, s: tile_heads(w, d, h, s) + 1, "not the copy"),
    ("tile_heads", these_sizes, "its own size"),
    ("tile_heads", once_round, "more than once"),
]


@pytest.mark.parametrize(
    ("name", "wrong", "said"), MISTAKES, ids=[f"{n}-{s[:24]}" for n, _, s in MISTAKES]
)
def test_each_mistake_gets_its_own_hint(name, wrong, said):
    result = CHECKS[name](wrong)
    assert not result and result.written
    assert said in result.message, result.message


def test_there_are_many_mistakes_of_each_exercise():
    for name in CHECKS:
        assert len({said for n, _, said in MISTAKES if n == name}) >= 10, name


def test_an_error_in_the_answer_is_told_with_its_line():
    def broken(n, room):
        return [n / 0]

    result = checks.pretraining.cut(broken)
    assert not result and "ZeroDivisionError" in result.message


def test_checks_leave_the_random_state_alone():
    state = torch.random.get_rng_state()
    for name, answer in (("mask", mask), ("accumulate", accumulate), ("tile_heads", tile_heads)):
        CHECKS[name](answer)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("12.")}
    assert mine == {check.exercise.number for check in CHECKS.values()}
