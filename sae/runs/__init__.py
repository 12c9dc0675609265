"""What any long run needs: its facts, what it will take, its processes and its end."""
