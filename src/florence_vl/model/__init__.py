"""The model: configuration -> towers -> fusion -> projector -> modeling; processing; assemble; loading."""
