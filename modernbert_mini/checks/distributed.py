"""Checks of chapter 15, more than one machine."""

import math

import torch
from torch import nn

from modernbert_mini import distributed as reference
from modernbert_mini.checks._machinery import exercise, expect


def _number(value: object, what: str) -> float:
    """The answer as a float; a tensor with one number will do."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    expect(
        isinstance(value, int | float) and not isinstance(value, bool),
        f"Is {what} a number? The check got a value of type `{type(value).__name__}`.",
    )
    expect(math.isfinite(value), f"Is {what} finite? Yours is {value}.")
    return float(value)


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


@exercise("15.1", "One loss from many", difficulty=1, minutes=5)
def combined_loss(answer):
    losses, counts = [2.0, 5.0, 3.0], [100, 10, 50]
    given = list(losses), list(counts)
    out = _number(answer(losses, counts), "your loss")
    expect((losses, counts) == given, "Does your function change its lists? The caller needs them.")
    total = sum(counts)
    mistakes = [
        (
            sum(losses) / 3,
            "Does every hidden token count the same? A plain mean gives the 10 tokens of the "
            "second process as much weight as the 100 of the first.",
        ),
        (
            sum(losses),
            "A sum of means is three times too large, and grows with every process that joins. By "
            "what do you divide?",
        ),
        (
            sum(x * n for x, n in zip(losses, counts, strict=True)),
            "You have the sum of all tokens' losses. The loss is a *mean*: over how many tokens?",
        ),
        (
            sum(x * n for x, n in zip(losses, counts, strict=True)) / 3,
            "You divide by the number of processes. The sum is one over *tokens*.",
        ),
        (
            sum(x / n for x, n in zip(losses, counts, strict=True)) / sum(1 / n for n in counts),
            "Which process should weigh most, the one with 100 tokens or the one with 10? Yours "
            "has it the other way round.",
        ),
        (losses[0], "That is the loss of the first process alone. It never saw the other streams."),
        (max(losses), "The largest of three means is not the mean of all tokens."),
    ]
    for wrong, hint in mistakes:
        expect(not _near(out, wrong), hint)
    right = sum(x * n for x, n in zip(losses, counts, strict=True)) / total
    expect(
        _near(out, right),
        f"With 100, 10 and 50 tokens at 2, 5 and 3 nats, all 160 have {right:.4f} on average. You "
        f"say {out:.4f}.",
    )
    expect(
        _near(_number(answer([7.0], [3]), "your loss"), 7.0),
        "Right for three processes, wrong for one, whose mean is the loss already.",
    )
    expect(
        _near(_number(answer([4.0, 8.0], [0, 5]), "your loss"), 8.0),
        "What does a process without a hidden token add? Nothing: its weight is 0.",
    )
    return "The same weights go before `backward`, so gradients add up to those of one process."


@exercise("15.2", "Deal out the streams", difficulty=2, minutes=12)
def share_streams(answer):
    tokens, processes = [90, 10, 30, 80, 70, 20, 60, 40], 2
    given = list(tokens)
    out = answer(tokens, processes)
    expect(tokens == given, "Does your function change the list of tokens? The caller needs it.")
    expect(
        isinstance(out, list | tuple) and all(isinstance(s, list | tuple) for s in out),
        "What does `my_share` return? A list for each process, of the numbers of its streams.",
    )
    expect(
        len(out) == processes,
        f"How many processes are there? {processes}; you have {len(out)} lists.",
    )
    flat = sorted(i for share in out for i in share)
    expect(
        flat != sorted(tokens),
        "Tokens or numbers? The process needs to know *which* streams are its own, 0 to 7.",
    )
    twice = sorted({i for i in flat if flat.count(i) > 1})
    expect(
        not twice,
        f"Streams {twice} are with more than one process: their tokens would count double.",
    )
    missing = sorted({*range(8)} - {*flat})
    expect(not missing, f"Who trains on streams {missing}? Nobody in yours: their text is lost.")
    uneven = [9, 1, 1, 1]
    found = answer(uneven, 2)
    expect(
        [len(share) for share in found] == [2, 2] and len({len(s) for s in out}) == 1,
        "Has everybody as many streams? Of 9, 1, 1 and 1 tokens you deal "
        f"{[len(share) for share in found]}. Sharded weights are put together in every pass, and "
        "that takes all processes: one that has fewer streams leaves the others waiting for ever.",
    )
    load = [sum(tokens[i] for i in share) for share in out]
    expect(
        {tuple(sorted(share)) for share in out} != {(0, 2, 4, 6), (1, 3, 5, 7)},
        f"Every other stream gives {load[0]} tokens and {load[1]}. Dealt in turn, a share is what "
        "luck makes it.",
    )
    expect(
        {tuple(sorted(share)) for share in out} != {(0, 1, 2, 3), (4, 5, 6, 7)},
        "The first half to one process, the second half to the other, as they come: does your "
        "function look at the tokens at all?",
    )
    ladder = [80, 70, 60, 50, 40, 30, 20, 10]
    gap = _spread(answer, ladder, 2)
    expect(
        gap != 160,
        "The fullest half to one process, the rest to the other: then one waits for the other most "
        "of the time. Take turns.",
    )
    expect(
        gap != 40,
        "Sorted, and dealt in turn: good. But who gets the fuller one of each pair? Always the "
        f"same in yours, and of {ladder} it has 40 tokens more. Let the one that has least so far "
        "choose first.",
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        many = torch.randint(100, 1000, (32,), generator=generator).tolist()
        best = _spread(reference.share_streams, many, 4)
        expect(
            _spread(answer, many, 4) <= max(best, 400),
            f"Balanced here, but of 32 streams for 4 processes the fullest share of yours has "
            f"{_spread(answer, many, 4)} tokens more than the emptiest; {best} can be had.",
        )
    return _round_mini(answer)


def _spread(answer, tokens: list[int], processes: int) -> int:
    load = [sum(tokens[i] for i in share) for share in answer(tokens, processes)]
    return max(load) - min(load)


def _round_mini(answer) -> str:
    """The gradients of two processes, averaged, against those of one: `mini` on four streams."""
    from modernbert_mini import ModernBertForMaskedLM
    from modernbert_mini.unpadding import join

    model = ModernBertForMaskedLM.from_pretrained("mini", sparse_prediction=True)
    generator = torch.Generator().manual_seed(0)
    streams = []
    for n in (60, 12, 44, 20):
        ids = torch.randint(300, 8000, (n,), generator=generator)  # (N,)
        labels = torch.where(torch.rand(n, generator=generator) < 0.3, ids, -100)
        streams.append(join([ids]) | {"labels": labels})
    hidden = [int((stream["labels"] >= 0).sum()) for stream in streams]

    def gradient(mine: list[int], processes: int) -> torch.Tensor:
        model.zero_grad()
        for i in mine:
            (model(**streams[i]).loss * hidden[i] / sum(hidden) * processes).backward()
        return nn.utils.parameters_to_vector([p.grad for p in model.parameters()])

    alone = gradient([0, 1, 2, 3], 1)
    shares = answer([len(stream["input_ids"]) for stream in streams], 2)
    mean = sum(gradient(list(share), 2) for share in shares) / 2
    gap = ((mean - alone).norm() / alone.norm()).item()
    expect(
        gap < 1e-4,
        f"All rules are kept, but the gradient of `mini` is off by {gap:.0%} of its length. Does "
        "your function remember something from an earlier call?",
    )
    return (
        f"Two processes with your shares: their mean gradient of `mini`, {len(alone):,} numbers, "
        f"differs from one process's by {gap:.0e} of its length."
    )


@exercise("15.3", "A slice of a parameter", difficulty=2, minutes=10)
def shard(answer):
    x = torch.arange(30.0).view(10, 3)
    given = x.clone()
    parts = [answer(x, rank, 4) for rank in range(4)]
    expect(torch.equal(x, given), "Does your function write into the tensor?")
    for rank, part in enumerate(parts):
        expect(
            isinstance(part, torch.Tensor),
            f"Is the slice of process {rank} a tensor? It is a `{type(part).__name__}`. One that "
            "gets no row has an empty one.",
        )
    sizes = [tuple(part.shape) for part in parts]
    expect(
        any(size != (10, 3) for size in sizes),
        "Everybody has all rows: that is a replica, and saves nothing.",
    )
    columns = x.shape[1]
    expect(
        all(len(size) == 2 and size[1] == columns for size in sizes),
        f"Along which dimension do you cut? FSDP2 cuts rows, dimension 0, and leaves the others "
        f"whole; your slices are {sizes}.",
    )
    rows = [size[0] for size in sizes]
    expect(
        sum(rows) >= 10,
        f"Where are the last rows? 10 rows over 4 processes: yours have {rows}, which makes "
        f"{sum(rows)}. Round the size of a slice up.",
    )
    expect(
        sum(rows) == 10,
        f"Does somebody hold rows that are not there? Yours have {rows}, which makes {sum(rows)} "
        "of 10. The last slice may be smaller.",
    )
    whole = torch.cat(parts)
    expect(
        whole.sort(dim=0).values.equal(x)
        and (whole.equal(x) or parts[0][:, 0].tolist() != [0, 12, 24]),
        "Every fourth row, or rows that stand together? A slice is one piece of memory, so that "
        "putting together needs no sorting.",
    )
    expect(whole.equal(x), "Put end to end, your slices are not the tensor. Are ranks mixed up?")
    expect(
        rows != [3, 3, 2, 2],
        "Balanced to the row: 3, 3, 2, 2. FSDP2 follows `torch.chunk`, whose slices are all of the "
        "same size but for the last: 3, 3, 3, 1. A checkpoint that is cut one way and read the "
        "other puts rows into the wrong place.",
    )
    expect(rows == [3, 3, 3, 1], f"`torch.chunk` makes 3, 3, 3 and 1 row of 10; you make {rows}.")
    few = [answer(torch.ones(2, 5), rank, 4) for rank in range(4)]
    expect(
        [tuple(part.shape) for part in few] == [(1, 5), (1, 5), (0, 5), (0, 5)],
        "Two rows, four processes: who gets nothing still needs a tensor, of shape (0, 5). Yours "
        f"are {[tuple(part.shape) for part in few]}.",
    )
    vector = [answer(torch.arange(7), rank, 2) for rank in range(2)]
    expect(
        [part.tolist() for part in vector] == [[0, 1, 2, 3], [4, 5, 6]],
        "Right for matrices. A bias or a norm has one dimension: (7,) gives 4 numbers and 3.",
    )
    return _round_checkpoint(answer)


def _round_checkpoint(answer) -> str:
    """Cut every parameter of `mini` in four, put it together from two times two, and predict."""
    from modernbert_mini import ModernBertForMaskedLM

    model = ModernBertForMaskedLM.from_pretrained("mini").eval()
    ids = torch.randint(300, 8000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits  # (1, L, V)
        held = [0] * 4
        for parameter in model.parameters():
            parts = [answer(parameter.detach(), rank, 4).clone() for rank in range(4)]
            held = [n + part.numel() for n, part in zip(held, parts, strict=True)]
            parameter.zero_()
            parameter.copy_(torch.cat(parts))
        after = model(ids).logits
    expect(
        torch.equal(before, after),
        "The slices of `mini`, put together, predict something else. Which parameter is it?",
    )
    return (
        f"`mini` in four: at most {max(held):,} of {sum(held):,} numbers in a process, and put "
        "together it predicts bit for bit what it did."
    )


@exercise("15.4", "How busy were the cards?", difficulty=2, minutes=8)
def utilisation(answer):
    tokens, flops, hours, cards, peak = 3.6e9, 1e9, 2.0, 5, 1e15
    out = _number(answer(tokens, flops, hours, cards, peak), "your share")
    needed, seconds = tokens * flops, hours * 3600
    mistakes = [
        (
            needed / (seconds * cards * peak),
            "Is that all a training step does? `flops` are those of the forward pass; the backward "
            "pass takes two products for each of its.",
        ),
        (
            2 * needed / (seconds * cards * peak),
            "You count the backward pass, and leave out the forward pass: together they are three.",
        ),
        (
            3 * needed / (hours * cards * peak),
            "In which unit is the peak? Operations per *second*; your time is in hours.",
        ),
        (
            3 * needed / (hours * 60 * cards * peak),
            "In which unit is the peak? Operations per *second*; your time is in minutes.",
        ),
        (
            3 * needed / (seconds * peak),
            "How many cards worked? You compare with the peak of a single one.",
        ),
        (
            100 * 3 * needed / (seconds * cards * peak),
            "A share or per cent? `my_mfu` returns a share: 0.3 for 30 %.",
        ),
        (
            3 * needed / (seconds * cards * 2 * peak),
            "Did you take the peak twice? Data sheets state double for matrices half of "
            "whose numbers are zeros; `peak` is without that already.",
        ),
        (
            seconds * cards * peak / (3 * needed),
            "Which is the whole, and which the part? Yours is upside down.",
        ),
        (
            3 * needed / seconds / cards,
            "You have the operations per second of a card. Which share of its peak is that?",
        ),
    ]
    for wrong, hint in mistakes:
        expect(not _near(out, wrong), hint)
    right = 3 * needed / (seconds * cards * peak)
    expect(
        _near(out, right),
        f"Here the cards were busy for {right:.4f} of the time; you say {out:.4f}.",
    )
    again = _number(answer(1e12, 2e8, 10.0, 8, 9e14), "your share")
    expect(
        _near(again, 3 * 2e20 / (36000 * 8 * 9e14)),
        "Right for the first numbers, wrong for others. Is one written into your code?",
    )
    return "Work that is needed, by the work that could have been done in the time."
