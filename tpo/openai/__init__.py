"""Our jobs in the shapes of OpenAI's API: `requests` is what comes in, `views` and `stream` what goes out."""
