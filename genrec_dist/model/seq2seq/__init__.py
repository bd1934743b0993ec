"""What the encoder-decoders share, and T5's."""
