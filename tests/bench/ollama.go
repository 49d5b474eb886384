// Renders conversations with a Go template, with the fields that Ollama fills.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content, Thinking string }

func main() {
	var input struct {
		Template      string
		Conversations [][]*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(input.Template))
	rendered := []string{}
	for _, conversation := range input.Conversations {
		// As Ollama does: all system messages are joined, and neighbours of one role are merged.
		var system []string
		var messages []*Message
		for _, message := range conversation {
			if message.Role == "system" {
				system = append(system, message.Content)
			}
			last := len(messages) - 1
			if last >= 0 && messages[last].Role == message.Role {
				messages[last].Content += "\n\n" + message.Content
			} else {
				messages = append(messages, message)
			}
		}
		var text strings.Builder
		fields := map[string]any{
			"System":   strings.Join(system, "\n\n"),
			"Messages": messages,
			"Response": "",
			"Think":    true,
		}
		if err := parsed.Execute(&text, fields); err != nil {
			panic(err)
		}
		rendered = append(rendered, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		panic(err)
	}
}
