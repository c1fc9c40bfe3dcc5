"""Each exercise of chapter 15: the solution passes, and each mistake gets its own hint."""

import math

import pytest
import torch

from modernbert_mini import checks, distributed


def combined_loss(losses, counts):
    return sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)


def snake(tokens, processes):
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    shares = [[] for _ in range(processes)]
    for k, i in enumerate(order):
        turn, seat = divmod(k, processes)
        shares[seat if turn % 2 == 0 else processes - 1 - seat].append(i)
    return shares


def shard(x, rank, processes):
    size = math.ceil(len(x) / processes)
    return x[rank * size : (rank + 1) * size]


def utilisation(tokens, flops, hours, cards, peak):
    return 3 * tokens * flops / (hours * 3600 * cards * peak)


SOLUTIONS = {
    "combined_loss": combined_loss,
    "share_streams": distributed.share_streams,
    "shard": shard,
    "utilisation": utilisation,
}


# ---- combined_loss ----


def plain_mean(losses, counts):
    return sum(losses) / len(losses)


def sum_of_means(losses, counts):
    return sum(losses)


def sum_of_tokens(losses, counts):
    return combined_loss(losses, counts) * sum(counts)


def by_processes(losses, counts):
    return combined_loss(losses, counts) * sum(counts) / len(counts)


def upside_down(losses, counts):
    shares = [1 / n for n in counts]
    return combined_loss(losses, shares)


def first_alone(losses, counts):
    return losses[0]


def largest(losses, counts):
    return max(losses)


def never_empty(losses, counts):
    return combined_loss(losses, [max(n, 1) for n in counts])


# ---- share_streams ----


def in_turn(tokens, processes):
    return [list(range(rank, len(tokens), processes)) for rank in range(processes)]


def in_blocks(tokens, processes):
    size = len(tokens) // processes
    return [list(range(rank * size, (rank + 1) * size)) for rank in range(processes)]


def sorted_blocks(tokens, processes):
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    return [[order[i] for i in block] for block in in_blocks(tokens, processes)]


def sorted_in_turn(tokens, processes):
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    return [[order[i] for i in share] for share in in_turn(tokens, processes)]


def emptiest_first(tokens, processes):
    shares, load = [[] for _ in range(processes)], [0] * processes
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += tokens[i]
    return shares


def lengths(tokens, processes):
    return [[tokens[i] for i in share] for share in distributed.share_streams(tokens, processes)]


def everything(tokens, processes):
    return [list(range(len(tokens)))] * processes


def one_lost(tokens, processes):
    shares = distributed.share_streams(tokens, processes)
    return [shares[0][:-1], *shares[1:]]


def one_list(tokens, processes):
    return [[i for s in distributed.share_streams(tokens, processes) for i in s]]


def only_two(tokens, processes):
    if processes == 2:
        return distributed.share_streams(tokens, 2)
    return in_turn(tokens, processes)


# ---- shard ----


def rounded_down(x, rank, processes):
    size = len(x) // processes
    return x[rank * size : (rank + 1) * size]


def balanced(x, rank, processes):
    return x.tensor_split(processes)[rank]


def every_fourth(x, rank, processes):
    return x[rank::processes]


def by_columns(x, rank, processes):
    return x.chunk(processes, dim=-1)[min(rank, len(x.chunk(processes, dim=-1)) - 1)]


def replica(x, rank, processes):
    return x


def padded(x, rank, processes):
    size = math.ceil(len(x) / processes)
    part = shard(x, rank, processes)
    return torch.cat([part, part.new_zeros(size - len(part), *x.shape[1:])])


def backwards(x, rank, processes):
    return shard(x, processes - 1 - rank, processes)


def chunked(x, rank, processes):
    chunks = x.chunk(processes)
    return chunks[rank] if rank < len(chunks) else x.new_zeros(0)


# ---- utilisation ----


def forward_alone(*given):
    return utilisation(*given) / 3


def backward_alone(*given):
    return utilisation(*given) * 2 / 3


def hours_as_seconds(*given):
    return utilisation(*given) * 3600


def minutes(*given):
    return utilisation(*given) * 60


def one_card(tokens, flops, hours, cards, peak):
    return utilisation(tokens, flops, hours, 1, peak)


def per_cent(*given):
    return utilisation(*given) * 100


def sparse_peak(*given):
    return utilisation(*given) / 2


def inverted(*given):
    return 1 / utilisation(*given)


def rate(tokens, flops, hours, cards, peak):
    return utilisation(tokens, flops, hours, cards, 1)


def written_in(*given):
    return 0.3


MISTAKES = {
    "combined_loss": [
        (plain_mean, "plain mean"),
        (sum_of_means, "three times too large"),
        (sum_of_tokens, "over how many tokens"),
        (by_processes, "number of processes"),
        (upside_down, "the other way round"),
        (first_alone, "first process alone"),
        (largest, "largest of three"),
        (never_empty, "without a hidden token"),
    ],
    "share_streams": [
        (in_turn, "Every other stream"),
        (in_blocks, "look at the tokens at all"),
        (sorted_blocks, "fullest half"),
        (sorted_in_turn, "Always the same in yours"),
        (emptiest_first, "as many streams"),
        (lengths, "Tokens or numbers"),
        (everything, "more than one process"),
        (one_lost, "their text is lost"),
        (one_list, "How many processes"),
        (only_two, "for 4 processes"),
    ],
    "shard": [
        (rounded_down, "Round the size"),
        (balanced, "3, 3, 2, 2"),
        (every_fourth, "Every fourth row"),
        (by_columns, "Along which dimension"),
        (replica, "a replica"),
        (padded, "rows that are not there"),
        (backwards, "Are ranks mixed up"),
        (chunked, "who gets nothing"),
    ],
    "utilisation": [
        (forward_alone, "Is that all"),
        (backward_alone, "leave out the forward"),
        (hours_as_seconds, "time is in hours"),
        (minutes, "time is in minutes"),
        (one_card, "How many cards"),
        (per_cent, "A share or per cent"),
        (sparse_peak, "peak twice"),
        (inverted, "upside down"),
        (rate, "operations per second of a card"),
        (written_in, "Is one written into your code"),
    ],
}


def check(name: str):
    return getattr(checks.distributed, name)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_solution_passes(name):
    result = check(name)(SOLUTIONS[name])
    assert result, result


def test_dealing_to_and_fro_passes_too():
    assert check("share_streams")(snake)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_stub_is_not_written_yet(name):
    def stub(*given):
        return None

    result = check(name)(stub)
    assert not result and not result.written


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [(name, wrong, said) for name, pairs in MISTAKES.items() for wrong, said in pairs],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mistake_gets_its_own_hint(name, wrong, said):
    result = check(name)(wrong)
    assert not result and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", SOLUTIONS)
def test_hints_differ(name):
    messages = [check(name)(wrong).message for wrong, _ in MISTAKES[name]]
    assert len(set(messages)) == len(messages)
