"""The commands that this package adds to `florence-vl`: module, one line of help, panel of the root help."""

demo = ("florence_vl_mini.demo.cli", "See the method run offline: fine-tune the embedded model, ask, report.", "Start")
mini = ("florence_vl_mini.cli", "How the embedded parts are made: data, pretraining, scores, packing.", "More")
