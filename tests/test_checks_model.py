"""Each exercise of chapter 10: the solution passes, and each mistake gets its own hint."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modernbert_mini import checks
from modernbert_mini.alternating_attention import padded_backends
from modernbert_mini.heads import mean_pool
from modernbert_mini.model import init_parameter
from modernbert_mini.rope import inverse_frequencies, rotary_table

# ---- count


def count(V, C, inner, n):
    attention, gated = 4 * C * C, 3 * C * inner
    norms = 2 * n - 1 + 3  # layer 0 has one less; embedding, final norm and head have one each
    return V * C + n * (attention + gated) + norms * C + C * C + V


def off_by(more):
    def wrong(V, C, inner, n):
        return count(V, C, inner, n) + more(V, C, inner, n)

    return wrong


def planted(name, function):
    """Give a lambda the name that its test case shows."""
    function.__name__ = name
    return function


decoder_twice = planted("decoder_twice", off_by(lambda V, C, inner, n: V * C))
no_decoder_bias = planted("no_decoder_bias", off_by(lambda V, C, inner, n: -V))
untied_without_bias = planted("untied_without_bias", off_by(lambda V, C, inner, n: V * C - V))
norm_in_layer_0 = planted("norm_in_layer_0", off_by(lambda V, C, inner, n: C))
half_of_wi = planted("half_of_wi", off_by(lambda V, C, inner, n: -n * C * inner))
wide_wo = planted("wide_wo", off_by(lambda V, C, inner, n: n * C * inner))
no_output_projection = planted("no_output_projection", off_by(lambda V, C, inner, n: -n * C * C))
queries_only = planted("queries_only", off_by(lambda V, C, inner, n: -2 * n * C * C))
one_norm_missing = planted("one_norm_missing", off_by(lambda V, C, inner, n: -C))
two_norms_missing = planted("two_norms_missing", off_by(lambda V, C, inner, n: -2 * C))
three_norms_missing = planted("three_norms_missing", off_by(lambda V, C, inner, n: -3 * C))
no_head = planted("no_head", off_by(lambda V, C, inner, n: -C * C - C))
encoder_only = planted("encoder_only", off_by(lambda V, C, inner, n: -C * C - C - V))
no_dense = planted("no_dense", off_by(lambda V, C, inner, n: -C * C))
norm_biases = planted("norm_biases", off_by(lambda V, C, inner, n: (2 * n + 2) * C))
linear_biases = planted("linear_biases", off_by(lambda V, C, inner, n: n * (5 * C + 2 * inner)))
lost = planted("lost", off_by(lambda V, C, inner, n: 12345))
a_float = planted("a_float", lambda V, C, inner, n: float(count(V, C, inner, n)))


# ---- layer


def layer(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x)), weights


def post_norm(self, x, cos, sin, attend):
    mixed, weights = self.attn(x, cos, sin, attend)
    x = self.attn_norm(x + mixed)
    return self.mlp_norm(x + self.mlp(x)), weights


def normed_stream(self, x, cos, sin, attend):
    x = self.attn_norm(x)
    mixed, weights = self.attn(x, cos, sin, attend)
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x)), weights


def parallel(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    return x + mixed + self.mlp(self.mlp_norm(x)), weights


def attention_replaces(self, x, cos, sin, attend):
    x, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    return x + self.mlp(self.mlp_norm(x)), weights


def geglu_replaces(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    return self.mlp(self.mlp_norm(x + mixed)), weights


def no_attn_norm(self, x, cos, sin, attend):
    mixed, weights = self.attn(x, cos, sin, attend)
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x)), weights


def no_mlp_norm(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    x = x + mixed
    return x + self.mlp(x), weights


def norms_exchanged(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.mlp_norm(x), cos, sin, attend)
    x = x + mixed
    return x + self.mlp(self.attn_norm(x)), weights


def one_norm_twice(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    x = x + mixed
    return x + self.mlp(self.attn_norm(x)), weights


def attention_only(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    return x + mixed, weights


def geglu_only(self, x, cos, sin, attend):
    return x + self.mlp(self.mlp_norm(x)), torch.ones(1)


def stream_alone(self, x, cos, sin, attend):
    return layer(self, x, cos, sin, attend)[0]


def weights_dropped(self, x, cos, sin, attend):
    return layer(self, x, cos, sin, attend)[0], None


def adds_in_place(self, x, cos, sin, attend):
    mixed, weights = self.attn(self.attn_norm(x), cos, sin, attend)
    x += mixed
    return x + self.mlp(self.mlp_norm(x)), weights


def doubled(self, x, cos, sin, attend):
    new, weights = layer(self, x, cos, sin, attend)
    return 2 * new, weights


def always_norms(self, x, cos, sin, attend):
    """Right wherever there is a norm; layer 0 has none."""
    norm = self.attn_norm if isinstance(self.attn_norm, nn.LayerNorm) else self.mlp_norm
    mixed, weights = self.attn(norm(x), cos, sin, attend)
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x)), weights


# ---- pool


def mean_of_all(x, mask):
    return x.mean(dim=1)


def padding_counted(x, mask):
    return (x * mask[..., None].to(x.dtype)).mean(dim=1)


def summed(x, mask):
    return (x * mask[..., None].to(x.dtype)).sum(dim=1)


def first_token(x, mask):
    return x[:, 0]


def count_of_the_batch(x, mask):
    return summed(x, mask) / mask.sum()


def mean_of_padding(x, mask):
    other = 1 - mask.to(x.dtype)
    return (x * other[..., None]).sum(dim=1) / other.sum(dim=1, keepdim=True).clamp_min(1)


def from_the_start(x, mask):
    return torch.stack([row[:n].mean(dim=0) for row, n in zip(x, mask.sum(dim=1), strict=True)])


def integers_only(x, mask):
    if mask.dtype == torch.bool:
        return x.mean(dim=1)
    return mean_pool(x, mask)


def widened(x, mask):
    return mean_pool(x.float(), mask)


def not_pooled(x, mask):
    return x * mask[..., None]


def over_dimensions(x, mask):
    return x.mean(dim=2)


def largest(x, mask):
    return x.max(dim=1).values


# ---- masked_loss


def masked_loss(logits, labels):
    chosen = labels != -100
    log_p = logits[chosen].log_softmax(dim=-1)
    return -log_p.gather(-1, labels[chosen][:, None]).mean()


def over_all_tokens(logits, labels):
    return masked_loss(logits, labels) * (labels != -100).sum() / labels.numel()


def summed_loss(logits, labels):
    return masked_loss(logits, labels) * (labels != -100).sum()


def ignored_as_class_0(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.clamp_min(0).flatten())


def ignored_as_last_class(logits, labels):
    last = torch.where(labels == -100, logits.shape[-1] - 1, labels)
    return F.cross_entropy(logits.flatten(0, 1), last.flatten())


def no_sign(logits, labels):
    return -masked_loss(logits, labels)


def in_bits(logits, labels):
    return masked_loss(logits, labels) / math.log(2)


def mean_of_means(logits, labels):
    return torch.stack([masked_loss(x, y) for x, y in zip(logits, labels, strict=True)]).mean()


def softmax_over_tokens(logits, labels):
    chosen = labels != -100
    log_p = logits.log_softmax(dim=1)[chosen]
    return -log_p.gather(-1, labels[chosen][:, None]).mean()


def mean_probability(logits, labels):
    chosen = labels != -100
    return logits[chosen].softmax(dim=-1).gather(-1, labels[chosen][:, None]).mean()


def raw_logits(logits, labels):
    chosen = labels != -100
    return -logits[chosen].gather(-1, labels[chosen][:, None]).mean()


def not_averaged(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def overflows(logits, labels):
    chosen = labels != -100
    p = logits[chosen].exp() / logits[chosen].exp().sum(dim=-1, keepdim=True)
    return -p.gather(-1, labels[chosen][:, None]).log().mean()


def something_else(logits, labels):
    return masked_loss(logits, labels) + 1


# ---- starting_values


def init(scale=lambda n: 1 / math.sqrt(2 * n), *, out=("Wo", "dense"), std=1.0, power=1, cut=2.0):
    """Starting values with one of the usual mistakes in them."""

    def fill(model):
        config = model.config
        for name, parameter in model.named_parameters():
            *_, module, kind = name.split(".")
            if kind == "bias":
                nn.init.zeros_(parameter)
            elif module.endswith("norm"):
                nn.init.ones_(parameter)
            else:
                spread = std * config.initializer_range**power
                spread *= scale(config.num_hidden_layers) if module in out else 1
                bound = cut * spread if cut else 2.0
                nn.init.trunc_normal_(parameter, std=spread, a=-bound, b=bound)
        return model

    return fill


def starting_values(model):
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, model.config)
    return model


def then(change):
    """The right starting values, and one thing undone."""

    def fill(model):
        starting_values(model)
        with torch.no_grad():
            change(model)
        return model

    return fill


def new_decoder(model):
    model.decoder.weight = nn.Parameter(0.02 * torch.randn_like(model.decoder.weight))


all_alike = planted("all_alike", init(lambda n: 1.0))
one_block_a_layer = planted("one_block_a_layer", init(lambda n: n**-0.5))
no_square_root = planted("no_square_root", init(lambda n: 1 / (2 * n)))
by_layers = planted("by_layers", init(lambda n: 1 / n))
all_scaled = planted("all_scaled", init(out=("Wo", "dense", "Wqkv", "Wi")))
dense_forgotten = planted("dense_forgotten", init(out=("Wo",)))
never_cut = planted("never_cut", init(cut=None))
cut_at_three = planted("cut_at_three", init(cut=3.0))
variance = planted("variance", init(power=2))
too_wide = planted("too_wide", init(std=3.0))
norms_drawn = planted("norms_drawn", then(lambda m: nn.init.normal_(m.head.norm.weight, std=0.02)))
norms_at_zero = planted("norms_at_zero", then(lambda m: m.head.norm.weight.zero_()))
biases_at_one = planted("biases_at_one", then(lambda m: m.decoder.bias.fill_(1.0)))
biases_drawn = planted("biases_drawn", then(lambda m: nn.init.normal_(m.decoder.bias, std=0.02)))
decoder_replaced = planted("decoder_replaced", then(new_decoder))
decoder_overwrites = planted(
    "decoder_overwrites", then(lambda m: nn.init.trunc_normal_(m.decoder.weight, std=0.005))
)


def one_forgotten(model):
    starting_values(model)
    nn.init.constant_(model.model.final_norm.weight, 7.0)
    return model


def copies(model):
    for _, parameter in model.named_parameters():
        nn.init.ones_(parameter.detach().clone())
    return model


def nothing_returned(model):
    starting_values(model)
    return "done"


def all_weights_constant(model):
    starting_values(model)
    for name, parameter in model.named_parameters():
        if ".Wqkv." in name:
            nn.init.constant_(parameter, 0.02)
    return model


# ---- encoder


def encoder(
    model,
    ids,
    *,
    window="half",
    kinds=None,
    bases=None,
    normed=True,
    final=True,
    layers=None,
    post=False,
    mlp=True,
):
    config = model.config
    x = model.embeddings(ids) if normed else model.embeddings.tok_embeddings(ids)
    reach = {"half": config.half_window, "whole": config.local_attention, "none": None}[window]
    windows = {"full_attention": None, "sliding_attention": reach}
    attend = padded_backends("sdpa", None, ids.shape[1], windows, ids.device)
    positions = torch.arange(ids.shape[1])
    tables = {
        kind: rotary_table(positions, inverse_frequencies(config.head_dim, rope["rope_theta"]))
        for kind, rope in config.rope_parameters.items()
    }
    for layer in layers(model.layers) if layers else model.layers:
        kind = kinds or layer.kind
        table = tables[bases or kind]
        if post:
            x = layer.attn_norm(x + layer.attn(x, *table, attend[kind])[0])
            x = layer.mlp_norm(x + layer.mlp(x))
            continue
        x = x + layer.attn(layer.attn_norm(x), *table, attend[kind])[0]
        if mlp:
            x = x + layer.mlp(layer.mlp_norm(x))
    return model.final_norm(x) if final else x


def twisted(name, **options):
    return planted(name, lambda model, ids: encoder(model, ids, **options))


no_final_norm = twisted("no_final_norm", final=False)
no_window = twisted("no_window", window="none")
whole_window = twisted("whole_window", window="whole")
all_local = twisted("all_local", kinds="sliding_attention")
all_global = twisted("all_global", kinds="full_attention")
global_base = twisted("global_base", bases="full_attention")
local_base = twisted("local_base", bases="sliding_attention")
raw_embedding = twisted("raw_embedding", normed=False)
backwards = twisted("backwards", layers=lambda layers: list(layers)[::-1])
last_layer_missing = twisted("last_layer_missing", layers=lambda layers: list(layers)[:-1])
no_geglu = twisted("no_geglu", mlp=False)
norms_after = twisted("norms_after", post=True)


def calls_the_model(model, ids):
    return model(ids).last_hidden_state


def first_row_only(model, ids):
    return encoder(model, ids[:1])


def shifted(model, ids):
    return encoder(model, ids) + 0.1


def four_layers(model, ids):
    """Right on a model of four layers."""
    return encoder(model, ids, layers=lambda layers: list(layers)[:4])


SOLUTIONS = {
    "count": count,
    "layer": layer,
    "pool": mean_pool,
    "masked_loss": masked_loss,
    "starting_values": starting_values,
    "encoder": encoder,
}
MISTAKES = {  # exercise -> mistake -> a piece of the hint that it must get
    "count": {
        decoder_twice: "a tied matrix is counted once",
        no_decoder_bias: "the decoder has a bias",
        untied_without_bias: "its bias of V numbers is missing",
        norm_in_layer_0: "which layer has no `attn_norm`?",
        half_of_wi: "so it has 2·I rows",
        wide_wo: "has I columns",
        no_output_projection: "is the output projection",
        queries_only: "three matrices in one",
        one_norm_missing: "is a norm missing?",
        two_norms_missing: "are two norms missing?",
        three_norms_missing: "are three norms missing?",
        no_head: "is the prediction head in it",
        encoder_only: "this is the encoder alone",
        no_dense: "is the dense matrix",
        norm_biases: "do your norms have a bias?",
        linear_biases: "do your matrices have biases?",
        lost: "off by +12,345. Count one part after the other",
        a_float: "Is the count a whole number?",
    },
    "layer": {
        post_norm: "that is post-norm",
        normed_stream: "goes past the norm untouched",
        parallel: "The two blocks come one after the other",
        attention_replaces: "Is attention's result added",
        geglu_replaces: "Is GeGLU's result added",
        no_attn_norm: "`self.attn_norm` is not used",
        no_mlp_norm: "`self.mlp_norm` is not used",
        norms_exchanged: "changed places",
        one_norm_twice: "Is `attn_norm` used twice?",
        attention_only: "Where is GeGLU?",
        geglu_only: "Where is attention?",
        stream_alone: "A layer returns two things",
        weights_dropped: "What became of the attention weights?",
        adds_in_place: "write into the `x` it was given",
        doubled: "Write it as two sentences",
        always_norms: "in `mini` the logits move",
    },
    "pool": {
        mean_of_all: "Is padding in your mean?",
        padding_counted: "and still in the count",
        summed: "Is this the sum or the mean?",
        first_token: "the first token's vector",
        count_of_the_batch: "this is that of the batch",
        mean_of_padding: "Which tokens are real",
        from_the_start: "wrong for padding on the left",
        integers_only: "true and false as well as 1 and 0",
        widened: "Which dtype comes back?",
        not_pooled: "or one for each token?",
        over_dimensions: "Expected `(3, 8)`, got `(3, 5)`",
        largest: "The third text has one real token",
    },
    "masked_loss": {
        over_all_tokens: "Only labelled tokens are asked",
        summed_loss: "Is this the sum or the mean",
        ignored_as_class_0: "for class 0",
        ignored_as_last_class: "for the last class",
        no_sign: "Which sign has the loss?",
        in_bits: "Which logarithm?",
        mean_of_means: "a mean of means",
        softmax_over_tokens: "Over which dimension is your softmax?",
        mean_probability: "Where is the logarithm?",
        raw_logits: "Where is the softmax?",
        not_averaged: "Is the loss one number?",
        overflows: "What if a logit is 500?",
        something_else: "Take one labelled token",
    },
    "starting_values": {
        all_alike: "Is `Wo` scaled down?",
        dense_forgotten: "Is `dense` scaled down?",
        one_block_a_layer: "How many blocks write to the stream?",
        no_square_root: "Is the square root missing",
        by_layers: "divided by the number of layers?",
        all_scaled: "Is `Wqkv` scaled down too?",
        never_cut: "numbers, not multiples of `std`",
        cut_at_three: "The furthest number is 3.0 standard deviations out",
        variance: "Variance or standard deviation?",
        too_wide: "spread by",
        norms_drawn: "A norm starts at 1, so that it only norms",
        norms_at_zero: "With a norm of 0 nothing comes through",
        biases_at_one: "start at 1?",
        biases_drawn: "A bias starts at 0",
        all_weights_constant: "Are all numbers of `Wqkv` equal?",
        decoder_replaced: "still one tensor?",
        decoder_overwrites: "What did your code do with the decoder?",
        one_forgotten: "forgotten?",
        copies: "or into copies of them?",
        nothing_returned: "Return the model at the end",
    },
    "encoder": {
        no_final_norm: "Where is the last norm?",
        no_window: "Do your local layers look at everything?",
        whole_window: "How far does a local layer see?",
        all_local: "Are all your layers local?",
        all_global: "Are all your layers global?",
        global_base: "Which base do your local layers turn with?",
        local_base: "Which base do your global layers turn with?",
        raw_embedding: "Is the embedding normed?",
        backwards: "Yours go backwards",
        last_layer_missing: "Do all layers run?",
        no_geglu: "That is attention alone",
        norms_after: "Where do your norms stand?",
        calls_the_model: "Did you call the model",
        first_row_only: "Which shape should",
        shifted: "The shape is right, the numbers are not",
        four_layers: "Right on a tiny model, but on `mini`",
    },
}
CASES = [
    pytest.param(name, mistake, said, id=f"{name}-{mistake.__name__}")
    for name, mistakes in MISTAKES.items()
    for mistake, said in mistakes.items()
]


def check(name):
    return getattr(checks.model, name)


@functools.cache
def outcome(name, mistake):
    return check(name)(mistake)


def test_every_exercise_of_the_chapter_is_tested():
    mine = {number for number in checks.EXERCISES if number.startswith("10.")}
    assert mine == {check(name).exercise.number for name in SOLUTIONS}
    assert SOLUTIONS.keys() == MISTAKES.keys() and all(len(m) >= 3 for m in MISTAKES.values())


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
    result = outcome(name, mistake)
    assert not result.passed and result.written
    assert said in result.message, result.message


@pytest.mark.parametrize("name", MISTAKES)
def test_no_two_mistakes_get_the_same_hint(name):
    messages = [outcome(name, mistake).message for mistake in MISTAKES[name]]
    assert len(set(messages)) == len(messages)


def test_checks_leave_the_random_state_and_gradients_alone():
    state = torch.random.get_rng_state()
    for name, solution in SOLUTIONS.items():
        check(name)(solution)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_other_ways_to_the_same_answer_pass():
    def untangled(model):  # module by module instead of name by name
        config = model.config
        small = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        tied = model.model.embeddings.tok_embeddings
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and module.weight is not tied.weight:
                std = small if name.endswith(("Wo", "dense")) else config.initializer_range
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        std = config.initializer_range
        nn.init.trunc_normal_(tied.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(model.decoder.bias)
        return model

    assert check("starting_values")(untangled), check("starting_values")(untangled)
    by_library = check("masked_loss")(
        lambda logits, labels: F.cross_entropy(logits.transpose(1, 2), labels)
    )
    assert by_library, by_library
