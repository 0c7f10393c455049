"""The commands that this package adds to `florence-vl`: module, one line of help, panel of the root help."""

demo = ("florence_vl_mini.demo.cli", "Offline demo: fine-tune the included model, query it, write a report.", "Start")
mini = ("florence_vl_mini.cli", "Build the included models: data, pretraining, scores, packing.", "More")
