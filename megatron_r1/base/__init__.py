"""What every other package may use. It has errors that end a command, files that are complete or
absent, child processes, functions that a recipe names as `module:function`, and the table of push
transports (`transports`). Of this project it imports `r1_grading.base` alone, which has the errors,
child processes and values in text that grading also needs."""
