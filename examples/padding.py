"""Sentences of unequal length in one batch: inside knorm.attention each row comes out as it would alone."""

import knorm

model, tokenizer = knorm.load_embedded()
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
sentences = ["The old house stood at the end of the lane, and nobody", "She opened the letter and"]
policy = knorm.Policy(keep_ratio=0.5, prune_after=8, protocol="streaming")

batch = tokenizer(sentences, return_tensors="pt", padding=True, return_token_type_ids=False)
with knorm.attention(model):
    together = model.generate(**batch, past_key_values=knorm.KnormCache(policy), max_new_tokens=12, do_sample=False)

for row, sentence in enumerate(sentences):
    ids = tokenizer(sentence, return_tensors="pt", return_token_type_ids=False)
    alone = model.generate(**ids, past_key_values=knorm.KnormCache(policy), max_new_tokens=12, do_sample=False)
    print(bool((together[row, -12:] == alone[0, -12:]).all()), repr(tokenizer.decode(alone[0, -12:])))
