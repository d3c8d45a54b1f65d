"""Export: a checkpoint, or the cut that made it, in the forms that other tools take."""
