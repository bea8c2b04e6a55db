import knorm
from knorm.cache import cache_keyword
from knorm.models import load_text

model, tokenizer = knorm.load_embedded()
ids = tokenizer(load_text("narrative")[:1000], return_tensors="pt").input_ids
policy = knorm.Policy(keep_ratio=0.5, prune_after=32, protect_recent=8, protocol="streaming")

nll = knorm.exact_nll(model, ids, policy)  # [1, tokens - 1]: NLL of each token in nats, from one forward pass
print(f"{nll.shape[1]} tokens, perplexity {nll.mean().exp():.1f}")

cache = knorm.KnormCache(policy)  # compresses itself while the model writes
written = model.generate(ids, **{cache_keyword(model): cache}, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0, -20:]), cache.memory())

keys = values = model.get_input_embeddings()(ids)[None].detach()  # any [batch, kv_heads, length, head_dim]
print(knorm.compress(keys, values, 0.5).positions.shape)  # one layer, compressed once


def newest(keys, values, keep_ratio):  # anybody's method
    count = int(keys.shape[2] * keep_ratio)
    return keys[:, :, -count:], values[:, :, -count:]


costs = knorm.evaluate(model, ids, knorm.method(newest, keep_ratio=0.5), prompt_length=ids.shape[1] // 2)
print(f"KL {costs.damage.kl:.4f}, same top token {costs.damage.same_top:.0%}, {costs.how}: {costs.check}")
