"""Jobs in the shapes of OpenAI's API: `requests` parses requests; `views` and `stream` build responses."""
