"""A small tokenizer of text, and a processor made of it."""

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dyntok.llm import VisualProcessor, extend_tokenizer
from dyntok.vocab import VisualVocab


def bpe():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["a photograph of a cat on a red chair, what is it? <image> user: assistant:"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<pad>"], initial_alphabet=alphabet)
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    fast.chat_template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    return fast


def made(visual, layout="none", any_grid=None, **options):
    tokenizer = bpe()
    vocab = VisualVocab.of(visual, after=len(tokenizer), layout=layout, any_grid=any_grid)
    extend_tokenizer(tokenizer, vocab)
    return VisualProcessor(tokenizer, visual, vocab, **options)
