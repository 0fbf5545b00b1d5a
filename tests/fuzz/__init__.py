"Damaged, foreign and odd input for the command, each with what must come of it, stated beforehand."
