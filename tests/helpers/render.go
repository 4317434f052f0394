// Renders chats with the TEMPLATE and SYSTEM of a Modelfile, as Ollama does: prints a JSON list.
package main

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"text/template"
)

type turn struct{ Role, Content string }

func quoted(modelfile, instruction string) (string, bool) {
	found := regexp.MustCompile(`(?s)` + instruction + ` """(.*?)"""`).FindStringSubmatch(modelfile)
	if found == nil {
		return "", false
	}
	return found[1], true
}

func main() {
	modelfile, _ := os.ReadFile(os.Args[1])
	data, _ := os.ReadFile(os.Args[2])
	var chats [][]turn
	if err := json.Unmarshal(data, &chats); err != nil {
		panic(err)
	}
	text, _ := quoted(string(modelfile), "TEMPLATE")
	system, has := quoted(string(modelfile), "SYSTEM")
	parsed := template.Must(template.New("").Parse(text))
	rendered := []string{}
	for _, chat := range chats {
		if has && chat[0].Role != "system" {
			chat = append([]turn{{"system", system}}, chat...)
		}
		var out strings.Builder
		if err := parsed.Execute(&out, map[string]any{"Messages": chat}); err != nil {
			panic(err)
		}
		rendered = append(rendered, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
