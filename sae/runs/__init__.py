"""What every long run needs: facts that identify it, its memory, disk and processes, stopping."""
