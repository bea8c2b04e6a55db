from mended import compress

import knorm
from knorm.models import load_text

model, tokenizer = knorm.load_embedded()
ids = tokenizer(load_text("narrative")[:1000], return_tensors="pt").input_ids

costs = knorm.evaluate(model, ids, knorm.method(compress, keep_ratio=0.5), prompt_length=128)  # anybody's method
print(f"KL {costs.damage.kl:.4f}, same top token {costs.damage.same_top:.0%}, {costs.how}: {costs.check}")

policy = knorm.Policy(keep_ratio=0.5, prune_after=32, protect_recent=8, protocol="streaming")  # knorm's own
nll = knorm.exact_nll(model, ids, policy)  # [1, tokens - 1]: NLL of each token in nats, from one forward pass
print(f"{nll.shape[1]} tokens, perplexity {nll.mean().exp():.1f}")

cache = knorm.KnormCache(policy)  # compresses itself while the model writes
written = model.generate(ids, **{knorm.cache_keyword(model): cache}, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0, -20:]), cache.memory())
