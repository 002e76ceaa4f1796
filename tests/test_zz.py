def test_a(tokenizer, photos, parity):
    import time
    t=time.time()
    e = tokenizer.encode(photos)
    print(e.lengths, [p.shape for p in photos], time.time()-t, len(e.packed_codes.unique()))
